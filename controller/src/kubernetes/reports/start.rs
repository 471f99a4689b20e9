//! What an earlier run, or the Go Hermes, has left: read once, so that only what differs is written.

use std::collections::BTreeMap;

use kube::Api;
use kube::api::ListParams;
use kube::core::{ApiResource, Object};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::sleep;

use super::write::{Failed, Key, Writer, Written, fingerprint, images, in_time, nodes, policies};
use crate::kubernetes::{MANAGER, backoff};

/// Objects in one page. A HermesNode may have some 30 kB.
const PAGE_SIZE: u32 = 100;

/// An object of which nothing is taken for granted.
type There = Object<Option<Value>, Value>;

/// What the API server has of policies, images and nodes. Tries until it answers.
pub(super) async fn read(writer: &Writer) -> BTreeMap<Key, Written> {
    let mut written = BTreeMap::new();
    for (resource, note) in [(policies(), policy as fn(There) -> (Key, Written)), (images(), image), (nodes(), node)] {
        let mut failures = 0;
        loop {
            match list(writer, &resource, note).await {
                Ok(found) => {
                    written.extend(found);
                    break;
                }
                Err(failed) => {
                    failures += 1;
                    let (kind, problem) = (resource.plural.as_str(), failed.problem());
                    tracing::warn!(kind, problem, "cannot list objects; nothing is written before");
                    sleep(backoff::after(failures)).await;
                }
            }
        }
    }
    written
}

async fn list(
    writer: &Writer,
    resource: &ApiResource,
    note: fn(There) -> (Key, Written),
) -> Result<Vec<(Key, Written)>, Failed> {
    let api = Api::<There>::all_with(writer.client.clone(), resource);
    let mut params = ListParams::default().limit(PAGE_SIZE);
    let mut found = Vec::new();
    loop {
        let page = in_time(api.list(&params)).await?;
        found.extend(page.items.into_iter().map(note));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

fn policy(object: There) -> (Key, Written) {
    let others = object.metadata.managed_fields.iter().flatten().any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        let writes_status = fields.is_some_and(|fields| fields.get("f:status").is_some());
        writes_status && entry.manager.as_deref() != Some(MANAGER)
    });
    let name = object.metadata.name.unwrap_or_default();
    let policy = object.status.and_then(parsed);
    (Key::Policy(name), Written { policy, has_foreign_status: others, uid: object.metadata.uid, ..Written::default() })
}

fn image(object: There) -> (Key, Written) {
    let name = object.metadata.name.unwrap_or_default();
    let (image, image_status) = (object.spec.and_then(parsed), object.status.and_then(parsed));
    (Key::Image(name), Written { image, image_status, uid: object.metadata.uid, ..Written::default() })
}

fn node(object: There) -> (Key, Written) {
    let name = object.metadata.name.unwrap_or_default();
    let node = object.status.and_then(parsed).map(|status| fingerprint(&status));
    (Key::Node(name), Written { node, uid: object.metadata.uid, ..Written::default() })
}

/// What cannot be read differs from whatever is to be written.
fn parsed<T: DeserializeOwned>(value: Value) -> Option<T> {
    serde_json::from_value(value).ok()
}
