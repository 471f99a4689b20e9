//! What the files of the folder say: `HermesPolicy` documents as kubectl takes them, and lists of images that stand for the
//! workloads that a cluster would have.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::crd::{GROUP, HermesPolicySpec};
use crate::event::{SecretRef, Workload, WorkloadId, WorkloadKind};

/// The namespace under which lists of images appear.
const LIST_NAMESPACE: &str = "images";
/// Documents in one file.
const DOCUMENTS_MAX: usize = 1000;
/// Images in one list.
const IMAGES_MAX: usize = 10_000;
/// Longest name of a document, as Kubernetes has it.
const NAME_LEN_MAX_BYTES: usize = 253;

/// What one document says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Declared {
    /// A policy: its name and spec.
    Policy(String, Box<HermesPolicySpec>),
    /// A list of images.
    Images(Workload),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    api_version: String,
    kind: String,
    metadata: Metadata,
    #[serde(default)]
    spec: Option<HermesPolicySpec>,
    #[serde(default)]
    images: Vec<String>,
    #[serde(default)]
    image_pull_secrets: Vec<String>,
    #[serde(default)]
    waiting: bool,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    name: String,
}

/// The documents of a file, in YAML or JSON; what is wrong with it otherwise.
pub(super) fn parse(text: &str) -> Result<Vec<Declared>, String> {
    let documents: Vec<Option<Document>> =
        serde_saphyr::from_multiple(text).map_err(|error| format!("it is not what it should be: {error}"))?;
    if documents.len() > DOCUMENTS_MAX {
        return Err(format!("it has more than {DOCUMENTS_MAX} documents"));
    }
    documents.into_iter().flatten().map(declared).collect()
}

fn declared(document: Document) -> Result<Declared, String> {
    let Document { api_version, kind, metadata: Metadata { name }, .. } = document;
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    if name.is_empty() || name.len() > NAME_LEN_MAX_BYTES || !name.bytes().all(plain) || name.starts_with(['.', '-']) {
        return Err(format!("the name '{}' is none that Kubernetes allows", name.escape_debug()));
    }
    let expected = format!("{GROUP}/v1alpha1");
    if api_version != expected {
        return Err(format!("'{name}' is of the apiVersion '{}', not {expected}", api_version.escape_debug()));
    }
    match kind.as_str() {
        "HermesPolicy" => Ok(Declared::Policy(name, Box::new(document.spec.unwrap_or_default()))),
        "ImageList" => images(name, document.images, &document.image_pull_secrets, document.waiting),
        other => Err(format!("'{name}' is of the kind '{}'; write HermesPolicy or ImageList", other.escape_debug())),
    }
}

fn images(name: String, images: Vec<String>, secrets: &[String], waiting: bool) -> Result<Declared, String> {
    if images.len() > IMAGES_MAX {
        return Err(format!("'{name}' lists more than {IMAGES_MAX} images"));
    }
    let pull_secrets = secrets.iter().map(|text| match text.split_once('/') {
        Some((namespace, secret)) => Ok(SecretRef { namespace: namespace.to_owned(), name: secret.to_owned() }),
        None => Err(format!("'{name}' names the secret '{}'; write NAMESPACE/NAME", text.escape_debug())),
    });
    Ok(Declared::Images(Workload {
        pull_secrets: pull_secrets.collect::<Result<_, _>>()?,
        id: WorkloadId { kind: WorkloadKind::Deployment, namespace: LIST_NAMESPACE.to_owned(), name },
        images: images.into_iter().collect::<BTreeSet<_>>(),
        waiting,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = r#"
apiVersion: hermes.cloudpilot.ai/v1alpha1
kind: HermesPolicy
metadata:
  name: vllm
  annotations: {who: team}
spec:
  paused: false
  imageSelectors:
    - imageRegex: ".*vllm.*"
  platforms:
    - linux/amd64
---
---
apiVersion: hermes.cloudpilot.ai/v1alpha1
kind: ImageList
metadata: {name: demo}
images: [redis:7, redis:7, "127.0.0.1:5000/app:v1"]
imagePullSecrets: [team/pull]
"#;

    #[test]
    fn policies_are_read_as_kubectl_takes_them_and_lists_beside() {
        let declared = parse(POLICY).expect("well formed");
        let [Declared::Policy(name, spec), Declared::Images(list)] = declared.as_slice() else {
            panic!("{declared:?}")
        };
        assert_eq!((name.as_str(), spec.image_selectors[0].image_regex.as_str()), ("vllm", ".*vllm.*"));
        assert_eq!((list.images.len(), list.id.name.as_str()), (2, "demo"));
        assert_eq!(list.pull_secrets, [SecretRef { namespace: "team".to_owned(), name: "pull".to_owned() }]);
        assert_eq!(parse("").expect("nothing"), []);
        let json = r#"{"apiVersion":"hermes.cloudpilot.ai/v1alpha1","kind":"HermesPolicy","metadata":{"name":"p"}}"#;
        assert_eq!(parse(json).expect("JSON is YAML").len(), 1);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let cases = [
            ("a: [", "it is not"),
            ("kind: HermesPolicy", "it is not"),
            (&POLICY.replace("kind: ImageList", "kind: Pod"), "'Pod'"),
            (&POLICY.replace("v1alpha1", "v9"), "apiVersion"),
            (&POLICY.replace("name: vllm", "name: ../up"), "name '../up'"),
            (&POLICY.replace("team/pull", "pull"), "NAMESPACE/NAME"),
            (&POLICY.replace("paused: false", "paused: 7"), "it is not"),
        ];
        for (text, expected) in cases {
            let error = parse(text).expect_err(text);
            assert!(error.contains(expected), "{error}");
        }
    }
}
