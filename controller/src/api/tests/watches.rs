//! What streams are told: everything once, then changes; over slowness, restarts and new roots.

use std::collections::BTreeSet;

use tonic::Streaming;

use super::*;

/// What a node has made of its stream.
#[derive(Debug, Default)]
struct Seen {
    history: u64,
    revision: u64,
    images: BTreeMap<Bytes, v1::Image>,
    members: BTreeSet<Bytes>,
    roots: usize,
    /// Images that came in the snapshot under way.
    fresh: BTreeSet<Bytes>,
    /// How many images were sent.
    sent: usize,
}

impl Seen {
    fn take(&mut self, update: Bytes) {
        let update = v1::WatchUpdate::decode(update).expect("an update");
        self.history = update.history;
        self.sent += update.images.len();
        self.roots = update.trust.map_or(self.roots, |trust| trust.roots.len());
        for image in update.images {
            self.fresh.insert(image.manifest.clone());
            self.images.insert(image.manifest.clone(), image);
        }
        for manifest in &update.gone_images {
            self.images.remove(manifest);
        }
        self.members.extend(update.members.into_iter().map(|member| member.peer));
        for peer in &update.gone_members {
            self.members.remove(peer);
        }
        if update.revision > 0 {
            self.revision = update.revision;
            let fresh = std::mem::take(&mut self.fresh);
            if update.snapshot {
                let kept: BTreeSet<u64> = update.kept.into_iter().collect();
                self.images.retain(|manifest, image| fresh.contains(manifest) || kept.contains(&image.fingerprint));
            }
        }
    }

    fn request(&self) -> v1::WatchRequest {
        let known = self.images.values().map(|image| image.fingerprint).collect();
        v1::WatchRequest { history: self.history, revision: self.revision, known }
    }

    fn manifests(&self) -> Vec<u8> {
        self.images.keys().map(|manifest| manifest[0]).collect()
    }

    /// Goes on with the stream until it is as `wanted`.
    async fn until(&mut self, stream: &mut Streaming<v1::WatchResponse>, wanted: impl Fn(&Self) -> bool) {
        while !wanted(self) {
            let next = within("an update", stream.message()).await.expect("goes on");
            self.take(next.expect("goes on").update);
        }
    }
}

async fn watch(client: &mut ControllerClient<Channel>, seen: &Seen) -> Streaming<v1::WatchResponse> {
    client.watch(seen.request()).await.expect("watches").into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_told_everything_then_changes_and_is_resumed() {
    let stage = Stage::new().await;
    stage.ready(1, Access::Public).await;
    stage.ready(2, Access::Private).await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let mut seen = Seen::default();
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.revision > 0).await;
    assert_eq!((seen.manifests(), seen.roots), (vec![1, 2], 1));
    let (public, private) = (&seen.images[[1; 32].as_slice()], &seen.images[[2; 32].as_slice()]);
    assert!(!public.statement.is_empty() && public.profile.is_empty() && public.profile_id.len() == 32);
    assert!(private.private && private.statement.is_empty() && private.references.is_empty());

    let me = Bytes::from(node.peer.to_bytes());
    seen.until(&mut stream, |seen| seen.members.contains(&me)).await;
    stage.ready(3, Access::Public).await;
    seen.until(&mut stream, |seen| seen.images.len() == 3).await;
    stage.hub.hear(&Action::Withdraw(ImageKey { manifest: Digest([1; 32]) }));
    seen.until(&mut stream, |seen| seen.images.len() == 2).await;

    // Whoever comes back hears of what it has missed, and of nothing else.
    drop(stream);
    stage.hub.hear(&Action::Withdraw(ImageKey { manifest: Digest([3; 32]) }));
    stage.ready(4, Access::Public).await;
    let sent = seen.sent;
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.manifests() == [2, 4]).await;
    assert_eq!(seen.sent, sent + 1, "more than what was missed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_comes_back_tells_what_differs() {
    let mut stage = Stage::new().await;
    let first = stage.ready(1, Access::Public).await;
    stage.ready(2, Access::Public).await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let mut seen = Seen::default();
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.images.len() == 2 && seen.revision > 0).await;
    let history = seen.history;
    stage.restart().await;
    while let Ok(Some(update)) = within("the end", stream.message()).await {
        seen.take(update.update);
    }
    stage.hub.hear(&Action::Publish(first));
    stage.ready(3, Access::Public).await;
    let sent = seen.sent;
    let mut client = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.history != history && seen.manifests() == [1, 3]).await;
    assert_eq!(seen.sent, sent + 1, "what it knew was sent again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_the_newest_word_and_no_queue() {
    let stage = Stage::new().await;
    let (_, mut client) = TestNode::joined("node-1", &stage).await;
    let mut seen = Seen::default();
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.revision > 0).await;
    // While it does not read, one image changes as often as would fill any window, were each change sent.
    let mut view = stage.index(1, Access::Public).await;
    for count in 0..20_000_u32 {
        view.names = BTreeSet::from([Name {
            reference: format!("registry.test/app:{count}"),
            platform: "linux/amd64".to_owned(),
        }]);
        stage.hub.hear(&Action::Publish(Arc::new(view.clone())));
    }
    let newest = |seen: &Seen| seen.images.values().any(|image| image.references == ["registry.test/app:19999"]);
    seen.until(&mut stream, newest).await;
    assert!(seen.sent < 2000, "{} versions were sent", seen.sent);
}

#[test]
fn a_cursor_that_is_too_old_gets_a_snapshot_and_misses_nothing() {
    let hub = Hub::new(Keys::new(KeySet::new(UnixMillis(0))));
    let peer = |no: u32| {
        let hash = *blake3::hash(&no.to_le_bytes()).as_bytes();
        hermes_p2p::admission::issuing::IssuingKey::from_seed(hash).public().peer().expect("a key")
    };
    let drain = |cursor: &mut super::super::hub::Cursor, seen: &mut Seen| {
        let mut updates = 0;
        while let Some(update) = hub.next(cursor) {
            assert!(update.len() < 80 * 1024, "an update of {} bytes", update.len());
            seen.take(update);
            updates += 1;
        }
        updates
    };
    for no in 0..2000 {
        hub.set_member(peer(no), Some(&["/ip4/10.0.0.1/tcp/1".parse().expect("an address")]));
    }
    hub.tick();
    let mut seen = Seen::default();
    let mut cursor = hub.cursor(0, 0, []);
    assert!(drain(&mut cursor, &mut seen) > 1, "a snapshot in one piece");
    assert_eq!(seen.members.len(), 2000);
    let old = seen.request();
    // The next one goes on from there.
    hub.set_member(peer(5), None);
    hub.tick();
    let mut cursor = hub.cursor(old.history, old.revision, []);
    assert_eq!(drain(&mut cursor, &mut seen), 1);
    assert_eq!(seen.members.len(), 1999);
    // More is gone than is remembered one by one.
    for no in 2000..21_000 {
        hub.set_member(peer(no), Some(&["/ip4/10.0.0.1/tcp/1".parse().expect("an address")]));
        if no % 4000 == 0 {
            hub.tick();
            for gone in no - 4000..no {
                hub.set_member(peer(gone), None);
            }
        }
    }
    hub.tick();
    let mut cursor = hub.cursor(old.history, old.revision, []);
    let before = hub.next(&mut cursor).expect("a first part");
    let first = v1::WatchUpdate::decode(before).expect("an update");
    assert!(first.snapshot && first.revision == 0, "it is gone on with changes that are forgotten");
    // What changes while the snapshot is walked is told after it.
    hub.set_member(peer(50_000), Some(&["/ip4/10.0.0.1/tcp/1".parse().expect("an address")]));
    hub.tick();
    let mut seen = Seen::default();
    drain(&mut cursor, &mut seen);
    assert!(seen.members.contains(peer(50_000).to_bytes().as_slice()));
    let (mut all, mut fresh) = (Seen::default(), hub.cursor(0, 0, []));
    drain(&mut fresh, &mut all);
    assert!(all.members.is_superset(&seen.members), "somebody is told of who is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_root_is_told_and_streams_go_on() {
    let mut stage = Stage::new().await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let mut seen = Seen::default();
    let mut stream = watch(&mut client, &seen).await;
    seen.until(&mut stream, |seen| seen.roots == 1).await;
    let before = stage.custody.current();
    stage.custody.renew().await.expect("renewed");
    seen.until(&mut stream, |seen| seen.roots == 2).await;
    stage.ready(1, Access::Public).await;
    seen.until(&mut stream, |seen| seen.images.len() == 1).await;
    // Who knows the old root alone still comes in, and is told the new one.
    let mut client = node.connect(stage.address(), &before).await.expect("connected");
    let answer = client.join(node.request("")).await.expect("joined").into_inner();
    assert_eq!(answer.trust.expect("told").roots.len(), 2);
    // It is kept: the next start has both.
    stage.restart().await;
    let kept = AuthorityFolder::new(stage.folder.path().join("authority"));
    let kept = kept.load(&"prod".parse().expect("a cluster")).expect("reads").expect("there");
    assert_eq!(kept.roots(), stage.custody.current().roots());
}
