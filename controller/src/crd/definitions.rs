//! The CustomResourceDefinitions of all objects, as they are installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;

use super::{HermesImage, HermesNode, HermesPolicy};

/// A definition, and the file of `deploy/chart/definitions/` that holds it.
#[derive(Debug, Clone)]
pub struct Definition {
    /// The file's name.
    pub file: &'static str,
    /// The definition.
    pub definition: CustomResourceDefinition,
}

impl Definition {
    /// The file's text.
    pub fn yaml(&self) -> String {
        let text =
            serde_saphyr::to_string(&self.definition).expect("a definition has only texts, numbers, lists and maps");
        format!(
            "# Made from controller/src/crd by `cargo run -p hermes-controller --example crds`; do not edit.\n{text}"
        )
    }
}

/// All definitions.
pub fn definitions() -> Vec<Definition> {
    [
        ("hermespolicies.yaml", HermesPolicy::crd()),
        ("hermesimages.yaml", HermesImage::crd()),
        ("hermesnodes.yaml", HermesNode::crd()),
    ]
    .into_iter()
    .map(|(file, definition)| Definition { file, definition: refined(definition) })
    .collect()
}

/// What the types alone cannot say.
fn refined(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let Some(schema) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) else {
            continue;
        };
        // An object without a spec is one with nothing in it, and was always taken.
        schema.required = None;
        refine(schema);
    }
    definition
}

/// Kubernetes knows the formats int32 and int64 alone and warns of others, and `kubectl explain` shows lines as they are,
/// so that those of a comment in the source would stand out.
fn refine(schema: &mut JSONSchemaProps) {
    // Kubernetes 1.20 as newer Go builds it takes an empty text for null here and refuses the definition. Whoever reads the
    // objects takes what is not there for empty.
    schema.default = schema.default.take().filter(|default| default.0 != "");
    // What may be null loses its fields in what `kubectl explain` is made of, and nobody writes null for what is not there.
    schema.nullable = None;
    schema.description = schema.description.take().map(|text| text.lines().collect::<Vec<_>>().join(" "));
    schema.format = schema.format.take().map(|format| match format.as_str() {
        "uint8" | "uint16" | "uint32" => "int32".to_owned(),
        "uint64" => "int64".to_owned(),
        _ => format,
    });
    for property in schema.properties.iter_mut().flatten() {
        refine(property.1);
    }
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => refine(items),
        Some(JSONSchemaPropsOrArray::Schemas(all)) => all.iter_mut().for_each(refine),
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        refine(values);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_files_are_what_the_types_say() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/definitions");
        let there = std::fs::read_dir(&folder).expect("the folder").flatten();
        let there: BTreeSet<_> = there.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let wanted = definitions();
        assert_eq!(there, wanted.iter().map(|each| each.file.to_owned()).collect());
        for each in wanted {
            let text = std::fs::read_to_string(folder.join(each.file)).expect("a definition");
            assert!(text == each.yaml(), "{} is old; run: cargo run -p hermes-controller --example crds", each.file);
        }
    }

    #[test]
    fn every_field_is_explained_and_no_format_is_unknown() {
        fn check(path: &str, schema: &JSONSchemaProps) {
            let format = schema.format.as_deref();
            assert!(matches!(format, None | Some("int32" | "int64" | "date-time")), "{path} has format {format:?}");
            for (name, property) in schema.properties.iter().flatten() {
                let path = format!("{path}.{name}");
                assert!(property.description.is_some(), "{path} has no description");
                check(&path, property);
            }
            if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
                check(&format!("{path}[]"), items);
            }
        }
        for each in definitions() {
            let version = each.definition.spec.versions.first().expect("a version");
            let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
            check(&each.definition.spec.names.kind, schema.expect("a schema"));
        }
    }
}
