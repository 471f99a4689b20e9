//! Who says that they hold a layer: the DHT records that this node keeps for others.
//!
//! libp2p's own store keeps the first 20 providers of a key and 1,024 keys, drops the rest silently, and forgets what
//! has expired only when somebody asks. A cluster needs the opposite: the *newest* holders, a bound in bytes, and a
//! sweep. So: at most [`PROVIDERS_PER_KEY_MAX`] providers of a key, the oldest going first; at most a given number of
//! bytes, the oldest record going first; and no single peer may own more than a quarter of them. Values are refused:
//! nobody may use this DHT as a disk.
//!
//! All records live as long as each other, so the order in which they came is the order in which they expire.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::iter;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::kad::store::{Error, RecordStore, Result};
use libp2p::kad::{ProviderRecord, Record, RecordKey};
use rand::seq::SliceRandom;

use crate::address::ADDRESSES_PER_PEER_MAX;

/// Most providers kept of one key. A lookup needs eight; a few times that spreads the load.
pub(crate) const PROVIDERS_PER_KEY_MAX: usize = 64;
/// Keys are diffIDs: 32 bytes.
pub(crate) const KEY_LEN_BYTES: usize = 32;
/// Longest address kept, in bytes. IPv6, TCP and a peer take 63.
const ADDRESS_LEN_MAX_BYTES: usize = 128;
/// What a record costs beside its key and addresses: three map entries, measured roughly.
const RECORD_OVERHEAD_BYTES: usize = 176;
/// One peer may own this part of the memory: one in four.
const SHARE_OF_ONE_PEER: usize = 4;

/// A record of another node and what it costs.
#[derive(Debug)]
struct Kept {
    number: u64,
    record: ProviderRecord,
    len_bytes: usize,
}

/// What one peer owns here.
#[derive(Debug, Default)]
struct Owned {
    len_bytes: usize,
    /// Its records, oldest first.
    order: BTreeMap<u64, RecordKey>,
}

/// The provider records of a node.
#[derive(Debug)]
pub(crate) struct ProviderStore {
    local: PeerId,
    ttl: Duration,
    len_max_bytes: usize,
    own_max: usize,
    own: HashMap<RecordKey, ProviderRecord>,
    keys: HashMap<RecordKey, Vec<Kept>>,
    peers: HashMap<PeerId, Owned>,
    /// All records of others, oldest first.
    order: BTreeMap<u64, (RecordKey, PeerId)>,
    next_number: u64,
    len_bytes: usize,
}

impl ProviderStore {
    /// An empty store of `local`, of at most `len_max_bytes` for others and `own_max` records of its own.
    pub(crate) fn new(local: PeerId, ttl: Duration, len_max_bytes: usize, own_max: usize) -> Self {
        Self {
            local,
            ttl,
            len_max_bytes,
            own_max,
            own: HashMap::new(),
            keys: HashMap::new(),
            peers: HashMap::new(),
            order: BTreeMap::new(),
            next_number: 0,
            len_bytes: 0,
        }
    }

    /// Bytes that the records of others take.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Removes what is past its time and says how many records that were.
    pub(crate) fn sweep(&mut self, now: Instant) -> usize {
        let mut count = 0;
        while let Some((_, (key, peer))) = self.order.first_key_value() {
            let (key, peer) = (key.clone(), *peer);
            let kept = self.keys.get(&key).and_then(|kept| kept.iter().find(|kept| kept.record.provider == peer));
            if kept.is_some_and(|kept| !kept.record.is_expired(now)) {
                break;
            }
            self.forget(&key, &peer);
            count += 1;
        }
        count
    }

    /// Removes everything that `peer` said.
    pub(crate) fn forget_peer(&mut self, peer: &PeerId) {
        let keys: Vec<RecordKey> =
            self.peers.get(peer).map(|owned| owned.order.values().cloned().collect()).unwrap_or_default();
        for key in keys {
            self.forget(&key, peer);
        }
    }

    fn forget(&mut self, key: &RecordKey, peer: &PeerId) {
        let Some(kept) = self.keys.get_mut(key) else { return };
        let Some(at) = kept.iter().position(|kept| kept.record.provider == *peer) else { return };
        let gone = kept.remove(at);
        if kept.is_empty() {
            self.keys.remove(key);
        }
        self.order.remove(&gone.number);
        self.len_bytes -= gone.len_bytes;
        if let Some(owned) = self.peers.get_mut(peer) {
            owned.order.remove(&gone.number);
            owned.len_bytes -= gone.len_bytes;
            if owned.order.is_empty() {
                self.peers.remove(peer);
            }
        }
    }

    fn insert(&mut self, mut record: ProviderRecord, now: Instant) {
        record.addresses.retain(|address| address.len() <= ADDRESS_LEN_MAX_BYTES);
        record.addresses.truncate(ADDRESSES_PER_PEER_MAX);
        record.addresses.shrink_to_fit();
        record.expires = Some(record.expires.unwrap_or(now + self.ttl));
        let (key, peer) = (record.key.clone(), record.provider);
        self.forget(&key, &peer);

        let addresses: usize = record.addresses.iter().map(libp2p::Multiaddr::len).sum();
        let len_bytes = RECORD_OVERHEAD_BYTES + 3 * KEY_LEN_BYTES + addresses;
        let number = self.next_number;
        self.next_number += 1;
        let kept = self.keys.entry(key.clone()).or_default();
        kept.push(Kept { number, record, len_bytes });
        let oldest_of_key = (kept.len() > PROVIDERS_PER_KEY_MAX).then(|| kept[0].record.provider);
        self.order.insert(number, (key.clone(), peer));
        self.len_bytes += len_bytes;
        let owned = self.peers.entry(peer).or_default();
        owned.order.insert(number, key.clone());
        owned.len_bytes += len_bytes;

        if let Some(oldest) = oldest_of_key {
            self.forget(&key, &oldest);
        }
        self.shrink(&peer);
    }

    fn shrink(&mut self, peer: &PeerId) {
        let share = self.len_max_bytes / SHARE_OF_ONE_PEER;
        while let Some(owned) = self.peers.get(peer).filter(|owned| owned.len_bytes > share) {
            let Some(oldest) = owned.order.values().next().cloned() else { break };
            self.forget(&oldest, peer);
        }
        while self.len_bytes > self.len_max_bytes {
            let Some((key, owner)) = self.order.values().next().cloned() else { break };
            self.forget(&key, &owner);
        }
    }
}

impl RecordStore for ProviderStore {
    type RecordsIter<'a> = iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = std::vec::IntoIter<Cow<'a, ProviderRecord>>;

    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        None
    }

    fn put(&mut self, _: Record) -> Result<()> {
        Err(Error::ValueTooLarge)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> Result<()> {
        if record.key.as_ref().len() != KEY_LEN_BYTES {
            return Err(Error::ValueTooLarge);
        }
        if record.provider != self.local {
            self.insert(record, Instant::now());
            return Ok(());
        }
        if self.own.len() >= self.own_max && !self.own.contains_key(&record.key) {
            return Err(Error::MaxProvidedKeys);
        }
        self.own.insert(record.key.clone(), record);
        Ok(())
    }

    /// In random order, because Kademlia answers with the first 20: else all who ask would get the same ones.
    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let others = self.keys.get(key).map(Vec::as_slice).unwrap_or_default();
        let mut all: Vec<ProviderRecord> = others.iter().map(|kept| kept.record.clone()).collect();
        all.extend(self.own.get(key).cloned());
        all.shuffle(&mut rand::rng());
        all
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        self.own.values().map(Cow::Borrowed).collect::<Vec<_>>().into_iter()
    }

    fn remove_provider(&mut self, key: &RecordKey, peer: &PeerId) {
        if *peer == self.local {
            self.own.remove(key);
        } else {
            self.forget(key, peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const TTL: Duration = Duration::from_secs(900);

    fn store(len_max_bytes: usize) -> ProviderStore {
        ProviderStore::new(PeerId::random(), TTL, len_max_bytes, 4)
    }

    fn key(no: u8) -> RecordKey {
        RecordKey::new(&[no; 32])
    }

    fn peers_of(store: &ProviderStore, key: &RecordKey) -> HashSet<PeerId> {
        store.providers(key).into_iter().map(|record| record.provider).collect()
    }

    fn assert_consistent(store: &ProviderStore) {
        let kept: usize = store.keys.values().flatten().map(|kept| kept.len_bytes).sum();
        assert_eq!(kept, store.len_bytes);
        assert_eq!(store.keys.values().flatten().count(), store.order.len());
        assert_eq!(store.peers.values().map(|owned| owned.order.len()).sum::<usize>(), store.order.len());
        assert_eq!(store.peers.values().map(|owned| owned.len_bytes).sum::<usize>(), store.len_bytes);
        assert!(store.len_bytes <= store.len_max_bytes);
        assert!(store.keys.values().all(|kept| !kept.is_empty() && kept.len() <= PROVIDERS_PER_KEY_MAX));
    }

    #[test]
    fn the_newest_providers_of_a_key_stay() {
        let mut store = store(1 << 20);
        let peers: Vec<PeerId> = (0..200).map(|_| PeerId::random()).collect();
        for peer in &peers {
            store.add_provider(ProviderRecord::new(key(1), *peer, Vec::new())).expect("kept");
        }
        let newest: HashSet<PeerId> = peers[200 - PROVIDERS_PER_KEY_MAX..].iter().copied().collect();
        assert_eq!(peers_of(&store, &key(1)), newest);
        assert_consistent(&store);
    }

    #[test]
    fn one_peer_cannot_push_out_the_others() {
        let mut store = store(64 << 10);
        let (honest, flooder) = (PeerId::random(), PeerId::random());
        store.add_provider(ProviderRecord::new(key(1), honest, Vec::new())).expect("kept");
        for no in 0..10_000_u32 {
            let mut name = [0; 32];
            name[..4].copy_from_slice(&no.to_le_bytes());
            store.add_provider(ProviderRecord::new(RecordKey::new(&name), flooder, Vec::new())).expect("kept");
        }
        assert_eq!(peers_of(&store, &key(1)), HashSet::from([honest]));
        assert!(store.len_bytes() <= (64 << 10) / SHARE_OF_ONE_PEER + 1024);
        assert_consistent(&store);
        store.forget_peer(&flooder);
        assert_eq!(store.order.len(), 1);
        assert_consistent(&store);
    }

    #[test]
    fn expired_records_are_swept_without_being_asked_for() {
        let mut store = store(1 << 20);
        let start = Instant::now();
        store.insert(ProviderRecord::new(key(1), PeerId::random(), Vec::new()), start);
        store.insert(ProviderRecord::new(key(2), PeerId::random(), Vec::new()), start + TTL / 2);
        assert_eq!(store.sweep(start + TTL / 2), 0);
        assert_eq!(store.sweep(start + TTL), 1);
        assert_eq!(store.sweep(start + TTL * 2), 1);
        assert_eq!(store.len_bytes(), 0);
        assert_consistent(&store);
    }

    #[test]
    fn values_and_foreign_keys_are_refused_and_own_records_are_bounded() {
        let mut store = store(1 << 20);
        assert!(store.put(Record::new(key(1), vec![1])).is_err());
        let long = RecordKey::new(&[1; 33]);
        assert!(store.add_provider(ProviderRecord::new(long, PeerId::random(), Vec::new())).is_err());
        let local = store.local;
        for no in 0..4 {
            store.add_provider(ProviderRecord::new(key(no), local, Vec::new())).expect("kept");
        }
        assert!(store.add_provider(ProviderRecord::new(key(9), local, Vec::new())).is_err());
        assert!(store.add_provider(ProviderRecord::new(key(3), local, Vec::new())).is_ok(), "a renewal is no new key");
        assert_eq!(store.provided().count(), 4);
        store.remove_provider(&key(0), &local);
        assert_eq!(store.provided().count(), 3);
    }

    proptest! {
        #[test]
        fn the_bounds_hold_under_any_sequence(
            steps in proptest::collection::vec((0_u8..6, 0_u8..12, 0_usize..12, 0_u64..2000), 0..300),
        ) {
            let peers: Vec<PeerId> = (0..12).map(|_| PeerId::random()).collect();
            let mut store = store(8 << 10);
            let mut now = Instant::now();
            let address: libp2p::Multiaddr = "/ip4/10.0.0.1/tcp/4001".parse().expect("a multiaddr");
            for (what, no, peer, seconds) in steps {
                match what {
                    0..4 => {
                        let addresses = vec![address.clone(); peer];
                        store.insert(ProviderRecord::new(key(no), peers[peer], addresses), now);
                    }
                    4 => store.remove_provider(&key(no), &peers[peer]),
                    _ => {
                        now += Duration::from_secs(seconds);
                        store.sweep(now);
                        let live = |kept: &Kept| !kept.record.is_expired(now);
                        prop_assert!(store.keys.values().flatten().all(live));
                    }
                }
                assert_consistent(&store);
            }
        }
    }
}
