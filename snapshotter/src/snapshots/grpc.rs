//! The service as gRPC asks for it: requests to calls, records to messages.
//!
//! Every call runs as a task of its own, so that one which containerd gave up waiting for still ends in order.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use hermes_containerd_api::snapshots::snapshots_server::Snapshots;
use hermes_containerd_api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest,
    MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest,
    StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use hermes_store::{Commit, LabelChange, SnapshotKind, SnapshotRecord, SnapshotUsage};
use tonic::{Request, Response, Status};

use super::calls::{Create, Snapshotter};
use super::error::{CallError, ServiceError};

/// Snapshots in one message of a list, as containerd's own service sends them.
const LIST_BATCH: usize = 100;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Grpc(pub(super) Arc<Snapshotter>);

impl Grpc {
    /// Carries a call out, to its end even when the caller goes away.
    async fn call<T, F>(&self, call: impl FnOnce(Arc<Snapshotter>) -> F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let done = self.0.tasks.spawn(call(Arc::clone(&self.0))).await;
        Ok(done.map_err(|_| CallError::Service(ServiceError::Interrupted))??)
    }
}

/// An absent parent is an empty text on the wire.
fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn info(record: SnapshotRecord) -> Info {
    let kind = match record.kind {
        SnapshotKind::View => Kind::View,
        SnapshotKind::Active => Kind::Active,
        SnapshotKind::Committed => Kind::Committed,
    };
    Info {
        created_at: Some(record.created().into()),
        updated_at: Some(record.updated().into()),
        name: record.name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        labels: record.labels,
    }
}

/// What an update changes: all labels, or the named ones, of which an absent one goes.
fn label_change(labels: BTreeMap<String, String>, mask: &[String]) -> Result<LabelChange, CallError> {
    let mut named = BTreeMap::new();
    let mut all = mask.is_empty();
    for path in mask {
        match path.strip_prefix("labels.") {
            Some(key) => {
                named.insert(key.to_owned(), labels.get(key).cloned().unwrap_or_default());
            }
            None if path == "labels" => all = true,
            None => {
                let path: String = path.chars().take(64).collect();
                return Err(CallError::Invalid(format!("'{path}' of a snapshot cannot be changed; only labels can")));
            }
        }
    }
    Ok(if all { LabelChange::All(labels) } else { LabelChange::Some(named) })
}

#[tonic::async_trait]
impl Snapshots for Grpc {
    type ListStream = BoxStream<'static, Result<ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let create = Create { kind: SnapshotKind::Active, key, parent: some(parent), labels };
        let mounts = self.call(|snapshotter| snapshotter.create(create)).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let create = Create { kind: SnapshotKind::View, key, parent: some(parent), labels };
        let mounts = self.call(|snapshotter| snapshotter.create(create)).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self.call(|snapshotter| snapshotter.mounts_of(key)).await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        let commit = Commit { key, name, labels, parent: some(parent), usage: SnapshotUsage::default() };
        self.call(|snapshotter| snapshotter.commit(commit)).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        self.call(|snapshotter| snapshotter.remove(key)).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let record = self.call(|snapshotter| snapshotter.stat(key)).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info(record)) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info: wanted, update_mask, .. } = request.into_inner();
        let wanted = wanted.ok_or_else(|| CallError::Invalid("the snapshot to change is missing".to_owned()))?;
        let change = label_change(wanted.labels, &update_mask.unwrap_or_default().paths)?;
        let record = self.call(|snapshotter| snapshotter.update(wanted.name, change)).await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info(record)) }))
    }

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let records = self.call(|snapshotter| snapshotter.list(filters)).await?;
        let infos = futures::stream::iter(records.into_iter().map(info));
        let batches = infos.chunks(LIST_BATCH).map(|info| Ok(ListSnapshotsResponse { info }));
        Ok(Response::new(batches.boxed()))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self.call(|snapshotter| snapshotter.usage(key)).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: signed(usage.size_bytes), inodes: signed(usage.inodes) }))
    }

    async fn cleanup(&self, _request: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.call(Snapshotter::cleanup).await?;
        Ok(Response::new(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_name_labels_and_nothing_else() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
        let change = |mask: &[&str]| {
            let mask: Vec<String> = mask.iter().map(|path| (*path).to_owned()).collect();
            label_change(labels.clone(), &mask)
        };
        assert_eq!(change(&[]).expect("all"), LabelChange::All(labels.clone()));
        assert_eq!(change(&["labels.a", "labels"]).expect("all"), LabelChange::All(labels.clone()));
        let named = BTreeMap::from([("a".to_owned(), "1".to_owned()), ("x.y".to_owned(), String::new())]);
        assert_eq!(change(&["labels.a", "labels.x.y"]).expect("some"), LabelChange::Some(named));
        assert!(matches!(change(&["parent"]), Err(CallError::Invalid(_))));
    }
}
