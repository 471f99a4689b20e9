//! Who is a member and who is suspected: a table, its merge rules, and its digest. Pure; time and connections are
//! arguments.
//!
//! - Of two entries of a node the one with the higher incarnation counts; suspicions are about one incarnation, so a new
//!   entry refutes them.
//! - A suspicion that is not refuted within a time removes its node, unless this node is connected to it. What
//!   is left is the suspicion, kept for [`GONE_FOR`], so that others who still have the entry are told, and the node
//!   itself when it speaks again.
//! - What one reporter may hold is bounded, so one liar can make at most an eighth of the list suspected, for as long as
//!   those need to answer.
//! - The digest is one word for each of 256 sets of entries; equal tables have equal digests on all nodes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;

use super::entry::{Entry, SignedEntry, Suspicion, word_of};
use super::list::{Member, MemberList};
use crate::admission::certificate::CLOCK_SKEW_SECONDS;
use crate::canonical::PeerKey;

/// Most members, this node included. An entry takes about 600 bytes of memory, so 6 MB.
pub const MEMBERS_MAX: usize = 10_000;
/// How long it is remembered that a node is gone. Longer than any message of it is on its way, and than most networks
/// are parted; the certificate of an entry that comes later has ended.
const GONE_FOR: Duration = Duration::from_secs(3600);
/// Most nodes that are remembered to be gone; beyond it the one that went first is forgotten.
const GONE_MAX: usize = MEMBERS_MAX;
/// A reporter may hold suspicions of this part of the list: one in eight.
const SHARE_OF_ONE_REPORTER: usize = 8;
/// But at least this many: two nodes of a small cluster may well die together.
const HELD_BY_ONE_MIN: usize = 2;
/// How long a suspicion counts against its reporter, refuted or not.
const HELD_FOR: Duration = Duration::from_secs(60);
/// Most suspicions at once, an eighth of the largest list and more than one frame carries.
pub(crate) const SUSPICIONS_MAX: usize = 1024;
/// How many sets the digest has. At 10,000 members one set has 39, whose summary is 624 bytes.
pub(crate) const BUCKETS: usize = 256;
/// An entry is passed on at most this often; what it says in between goes with the regular exchanges.
const PUSH_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Held {
    suspicion: Suspicion,
    since: Instant,
}

#[derive(Debug)]
struct Record {
    peer: PeerId,
    signed: Arc<SignedEntry>,
    fingerprint: u64,
    held: Option<Held>,
    pushed: Option<Instant>,
}

#[derive(Debug)]
struct Gone {
    incarnation: u64,
    suspicion: Suspicion,
    until: Instant,
}

/// What came of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Merged {
    /// It says something that others should hear at once.
    News,
    /// It is newer, and says what was known.
    Renewed,
    /// It was known, or is old.
    Known,
    /// Its node is known to be gone as of this entry: whoever has sent it should know.
    Gone(Box<Suspicion>),
    /// There is no room.
    Full,
}

/// What came of a suspicion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Others should hear it at once.
    News,
    /// It was known, or is about an old entry or nobody.
    Nothing,
    /// It is about this node, which should say something new.
    OfMe,
    /// Its reporter has said that of too many.
    TooMany,
}

/// What this node knows of a set of entries, to be compared: the first word of the key and the incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    pub(crate) short: u64,
    pub(crate) incarnation: u64,
}

/// The entries of all members.
#[derive(Debug)]
pub(crate) struct Table {
    me: PeerKey,
    records: BTreeMap<PeerKey, Record>,
    gone: BTreeMap<PeerKey, Gone>,
    /// When the suspicions of each reporter were taken, oldest first.
    reporters: HashMap<PeerKey, VecDeque<Instant>>,
    buckets: Box<[u64; BUCKETS]>,
    held_count: usize,
    held_word: u64,
    suspect_for: Duration,
}

/// The first word of a key. Keys are points of a curve, so their bytes are as good as a hash.
pub(crate) fn short_of(key: &PeerKey) -> u64 {
    let (word, _) = key.0.split_first_chunk().expect("a key has 32 bytes");
    u64::from_be_bytes(*word)
}

fn bucket_of(key: &PeerKey) -> usize {
    usize::from(key.0[0])
}

impl Table {
    /// A table with this node's own entry, in which the suspected have `suspect_for` to answer.
    pub(crate) fn new(own: SignedEntry, suspect_for: Duration) -> Self {
        let mut table = Self {
            me: own.entry.key,
            records: BTreeMap::new(),
            gone: BTreeMap::new(),
            reporters: HashMap::new(),
            buckets: Box::new([0; BUCKETS]),
            held_count: 0,
            held_word: 0,
            suspect_for,
        };
        let peer = own.entry.key.peer().expect("this node has a key");
        table.put(peer, own);
        table
    }

    /// This node's own entry.
    pub(crate) fn own(&self) -> &Arc<SignedEntry> {
        &self.records[&self.me].signed
    }

    pub(crate) fn get(&self, key: &PeerKey) -> Option<&Arc<SignedEntry>> {
        self.records.get(key).map(|record| &record.signed)
    }

    /// All entries but this node's own, with whom they are about.
    pub(crate) fn others(&self) -> impl Iterator<Item = (&PeerId, &Arc<SignedEntry>)> {
        let me = self.me;
        self.records.iter().filter(move |(key, _)| **key != me).map(|(_, record)| (&record.peer, &record.signed))
    }

    /// Whether an entry is worth checking its signatures: it would change the table.
    pub(crate) fn wants(&self, entry: &Entry) -> bool {
        entry.key != self.me
            && self.records.get(&entry.key).is_none_or(|record| record.signed.entry.incarnation < entry.incarnation)
    }

    /// Replaces this node's own entry.
    pub(crate) fn set_own(&mut self, own: SignedEntry) {
        debug_assert_eq!(own.entry.key, self.me);
        let peer = self.records[&self.me].peer;
        self.put(peer, own);
    }

    /// Takes a genuine entry of `peer`.
    pub(crate) fn merge(&mut self, peer: PeerId, signed: SignedEntry) -> Merged {
        let key = signed.entry.key;
        if key == self.me {
            return Merged::Known;
        }
        if let Some(gone) = self.gone.get(&key) {
            if signed.entry.incarnation <= gone.incarnation {
                return Merged::Gone(Box::new(gone.suspicion.clone()));
            }
            self.gone.remove(&key);
        }
        let merged = match self.records.get(&key) {
            Some(known) if known.signed.entry.incarnation >= signed.entry.incarnation => return Merged::Known,
            Some(known) if known.held.is_none() && !signed.entry.is_news_after(&known.signed.entry) => Merged::Renewed,
            Some(_) => Merged::News,
            None if self.records.len() >= MEMBERS_MAX => return Merged::Full,
            None => Merged::News,
        };
        self.put(peer, signed);
        merged
    }

    fn put(&mut self, peer: PeerId, signed: SignedEntry) {
        let key = signed.entry.key;
        let pushed = self.take(&key).and_then(|old| old.pushed);
        let fingerprint = signed.fingerprint();
        self.buckets[bucket_of(&key)] ^= fingerprint;
        self.records.insert(key, Record { peer, signed: Arc::new(signed), fingerprint, held: None, pushed });
    }

    fn take(&mut self, key: &PeerKey) -> Option<Record> {
        let record = self.records.remove(key)?;
        self.buckets[bucket_of(key)] ^= record.fingerprint;
        if let Some(held) = &record.held {
            self.held_count -= 1;
            self.held_word ^= held.suspicion.fingerprint();
        }
        Some(record)
    }

    /// What this node says when it cannot reach `target`: as of which incarnation. `None` when there is nothing to say.
    pub(crate) fn suspectable(&self, target: &PeerKey) -> Option<u64> {
        let record = self.records.get(target).filter(|record| *target != self.me && record.held.is_none())?;
        Some(record.signed.entry.incarnation)
    }

    /// Whether a suspicion is worth checking its signature.
    pub(crate) fn wants_suspicion(&self, said: &Suspicion) -> bool {
        let known = self.records.get(&said.target);
        known.is_some_and(|record| {
            said.target == self.me || (record.held.is_none() && record.signed.entry.incarnation == said.incarnation)
        })
    }

    /// Takes a genuine suspicion.
    pub(crate) fn suspect(&mut self, said: Suspicion, now: Instant) -> Heard {
        let share = (self.records.len() / SHARE_OF_ONE_REPORTER).max(HELD_BY_ONE_MIN);
        if said.target == self.me {
            let current = self.own().entry.incarnation;
            return if said.incarnation >= current { Heard::OfMe } else { Heard::Nothing };
        }
        if !self.records.contains_key(&said.reporter) || said.reporter == said.target {
            return Heard::Nothing;
        }
        let Some(record) = self.records.get_mut(&said.target) else { return Heard::Nothing };
        if record.held.is_some() || record.signed.entry.incarnation != said.incarnation {
            return Heard::Nothing;
        }
        let times = self.reporters.entry(said.reporter).or_default();
        while times.front().is_some_and(|time| now.duration_since(*time) >= HELD_FOR) {
            times.pop_front();
        }
        if times.len() >= share || self.held_count >= SUSPICIONS_MAX {
            return Heard::TooMany;
        }
        times.push_back(now);
        self.held_count += 1;
        self.held_word ^= said.fingerprint();
        record.held = Some(Held { suspicion: said, since: now });
        Heard::News
    }

    /// Removes who has not answered in time and whose certificate has ended by `clock` (seconds since 1970). Says who
    /// that was.
    pub(crate) fn sweep(
        &mut self,
        now: Instant,
        clock: u64,
        connected: impl Fn(&PeerId) -> bool,
    ) -> Vec<(PeerId, Arc<SignedEntry>)> {
        self.gone.retain(|_, gone| gone.until > now);
        self.reporters.retain(|_, times| times.back().is_some_and(|last| now.duration_since(*last) < HELD_FOR));
        let ended = |record: &Record| {
            let certificate = record.signed.entry.certificate.as_ref();
            certificate.is_some_and(|certificate| clock > certificate.not_after.saturating_add(CLOCK_SKEW_SECONDS))
        };
        let silent = |record: &Record| {
            record.held.as_ref().is_some_and(|held| now.duration_since(held.since) >= self.suspect_for)
                && !connected(&record.peer)
        };
        let me = self.me;
        let leaving = |(key, record): (&PeerKey, &Record)| {
            (*key != me && (ended(record) || silent(record))).then_some((*key, silent(record)))
        };
        let leaving: Vec<(PeerKey, bool)> = self.records.iter().filter_map(leaving).collect();
        let mut left = Vec::with_capacity(leaving.len());
        for (key, silent) in leaving {
            let Some(record) = self.take(&key) else { continue };
            left.push((record.peer, Arc::clone(&record.signed)));
            if let Some(held) = record.held.filter(|_| silent) {
                self.remember_gone(key, record.signed.entry.incarnation, held.suspicion, now);
            }
        }
        left
    }

    fn remember_gone(&mut self, key: PeerKey, incarnation: u64, suspicion: Suspicion, now: Instant) {
        self.gone.insert(key, Gone { incarnation, suspicion, until: now + GONE_FOR });
        if self.gone.len() > GONE_MAX {
            let first = self.gone.iter().min_by_key(|(_, gone)| gone.until).map(|(key, _)| *key);
            first.map(|first| self.gone.remove(&first));
        }
    }

    /// Removes those who may not be members: their certificates were taken back.
    pub(crate) fn remove(&mut self, may_not: impl Fn(&PeerId, &Entry) -> bool) -> Vec<PeerId> {
        let me = self.me;
        let refused = |record: &Record| may_not(&record.peer, &record.signed.entry);
        let named = self.records.iter().filter(|(key, record)| **key != me && refused(record));
        let keys: Vec<PeerKey> = named.map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.take(key)).map(|record| record.peer).collect()
    }

    /// The list as of now.
    pub(crate) fn list(&self, connected: impl Fn(&PeerId) -> bool) -> MemberList {
        let member = |record: &Record| {
            let entry = &record.signed.entry;
            Arc::new(Member {
                peer: record.peer,
                key: Member::key_of(&record.peer),
                addresses: entry.multiaddrs(),
                zone: entry.zone.clone(),
                drain: entry.drain,
                full: entry.full,
                suspected: record.held.is_some() && !connected(&record.peer),
                certificate_until: entry.certificate.as_ref().map(|certificate| certificate.not_after),
            })
        };
        let me = self.records[&self.me].peer;
        MemberList::new(self.records.values().map(member).collect(), &me)
    }

    /// Whom a suspicion is held of.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = PeerId> {
        self.records.values().filter(|record| record.held.is_some()).map(|record| record.peer)
    }

    /// One word for all entries.
    pub(crate) fn root(&self) -> u64 {
        let bytes: Vec<u8> = self.buckets.iter().flat_map(|bucket| bucket.to_le_bytes()).collect();
        word_of(&bytes)
    }

    /// One word for all suspicions.
    pub(crate) fn suspicion_word(&self) -> u64 {
        self.held_word
    }

    /// One word for each set of entries.
    pub(crate) fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets
    }

    /// All suspicions.
    pub(crate) fn suspicions(&self) -> Vec<Suspicion> {
        let held = self.records.values().filter_map(|record| record.held.as_ref());
        held.map(|held| held.suspicion.clone()).take(SUSPICIONS_MAX).collect()
    }

    /// What is in the sets that `wanted` says.
    pub(crate) fn summary(&self, wanted: impl Fn(usize) -> bool) -> Vec<Known> {
        let among = self.records.iter().filter(|(key, _)| wanted(bucket_of(key)));
        among
            .map(|(key, record)| Known { short: short_of(key), incarnation: record.signed.entry.incarnation })
            .collect()
    }

    /// Compares the sets that `wanted` says with `theirs`: the entries that they lack or have old, the short keys of those
    /// that this node lacks or has old, and suspicions of whom they have and this node knows to be gone.
    pub(crate) fn compare(
        &self,
        wanted: impl Fn(usize) -> bool,
        theirs: &[Known],
    ) -> (Vec<Arc<SignedEntry>>, Vec<u64>, Vec<Suspicion>) {
        let theirs: HashMap<u64, u64> = theirs.iter().map(|known| (known.short, known.incarnation)).collect();
        let mut give = Vec::new();
        let mut ours: HashMap<u64, u64> = HashMap::new();
        for (key, record) in self.records.iter().filter(|(key, _)| wanted(bucket_of(key))) {
            let incarnation = record.signed.entry.incarnation;
            ours.insert(short_of(key), incarnation);
            if theirs.get(&short_of(key)).is_none_or(|known| *known < incarnation) {
                give.push(Arc::clone(&record.signed));
            }
        }
        let mut gone = Vec::new();
        for (key, known) in self.gone.iter().filter(|(key, _)| wanted(bucket_of(key))) {
            let short = short_of(key);
            if theirs.get(&short).is_some_and(|theirs| *theirs <= known.incarnation) {
                ours.insert(short, known.incarnation);
                gone.push(known.suspicion.clone());
            }
        }
        gone.truncate(SUSPICIONS_MAX);
        let lacks = |(short, incarnation): (&u64, &u64)| {
            ours.get(short).is_none_or(|known| known < incarnation).then_some(*short)
        };
        let want = theirs.iter().filter_map(lacks).collect();
        (give, want, gone)
    }

    /// The entries of these short keys.
    pub(crate) fn entries_of(&self, shorts: &[u64]) -> Vec<Arc<SignedEntry>> {
        let wanted: std::collections::HashSet<u64> = shorts.iter().copied().collect();
        let records = self.records.iter().filter(|(key, _)| wanted.contains(&short_of(key)));
        records.map(|(_, record)| Arc::clone(&record.signed)).collect()
    }

    /// The entry of `key`, to be passed on at once; `None` when that was done a moment ago.
    pub(crate) fn take_push(&mut self, key: &PeerKey, now: Instant) -> Option<Arc<SignedEntry>> {
        let own = *key == self.me;
        let record = self.records.get_mut(key)?;
        let recently = record.pushed.is_some_and(|last| now.duration_since(last) < PUSH_EVERY);
        if recently && !own {
            return None;
        }
        record.pushed = Some(now);
        Some(Arc::clone(&record.signed))
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::ed25519;
    use proptest::prelude::*;

    use super::super::entry::tests::{cluster, said};
    use super::*;

    fn peer_of(entry: &Entry) -> PeerId {
        entry.key.peer().expect("a key")
    }

    struct Other {
        pair: ed25519::Keypair,
        entry: Entry,
    }

    impl Other {
        fn new() -> Self {
            let (pair, entry) = said(1);
            Self { pair, entry }
        }

        fn signed(&self) -> SignedEntry {
            self.entry.clone().sign(&cluster(), &self.pair)
        }

        fn peer(&self) -> PeerId {
            peer_of(&self.entry)
        }

        fn suspects(&self, other: &Self) -> Suspicion {
            Suspicion::new(&cluster(), other.entry.key, other.entry.incarnation, &self.pair)
        }

        fn says(&mut self, change: impl FnOnce(&mut Entry)) -> SignedEntry {
            self.entry.incarnation += 1;
            change(&mut self.entry);
            self.signed()
        }
    }

    fn table(others: &[Other]) -> (Other, Table) {
        let me = Other::new();
        let mut table = Table::new(me.signed(), SUSPECT_FOR);
        for other in others {
            assert_eq!(table.merge(other.peer(), other.signed()), Merged::News);
        }
        (me, table)
    }

    fn others(count: usize) -> Vec<Other> {
        (0..count).map(|_| Other::new()).collect()
    }

    const SUSPECT_FOR: Duration = Duration::from_secs(30);

    fn swept(table: &mut Table, now: Instant, clock: u64, connected: fn(&PeerId) -> bool) -> Vec<PeerId> {
        table.sweep(now, clock, connected).into_iter().map(|(peer, _)| peer).collect()
    }

    const NOBODY: fn(&PeerId) -> bool = |_| false;

    #[test]
    fn the_higher_incarnation_counts_and_only_changes_are_news() {
        let mut all = others(1);
        let (_, mut table) = table(&all);
        let old = all[0].signed();
        let renewed = all[0].says(|_| ());
        assert_eq!(table.merge(all[0].peer(), renewed), Merged::Renewed);
        assert_eq!(table.merge(all[0].peer(), old), Merged::Known);
        let drains = all[0].says(|entry| entry.drain = true);
        assert_eq!(table.merge(all[0].peer(), drains), Merged::News);
        assert!(table.list(NOBODY).get(&all[0].peer()).is_some_and(|member| member.drain && !member.eligible()));
    }

    #[test]
    fn a_suspected_node_leaves_unless_it_answers_or_is_connected() {
        let mut all = others(3);
        let (_, mut table) = table(&all);
        let start = Instant::now();
        assert_eq!(table.suspect(all[0].suspects(&all[1]), start), Heard::News);
        assert_eq!(table.suspect(all[2].suspects(&all[1]), start), Heard::Nothing, "one is enough");
        let suspected = |table: &Table, other: &Other, connected: fn(&PeerId) -> bool| {
            table.list(connected).get(&other.peer()).is_some_and(|member| member.suspected)
        };
        assert!(suspected(&table, &all[1], NOBODY) && !suspected(&table, &all[1], |_| true));
        assert_eq!(swept(&mut table, start + SUSPECT_FOR / 2, 0, NOBODY), []);
        assert_eq!(swept(&mut table, start + SUSPECT_FOR, 0, |_| true), [], "a connected one was removed");

        // It answers.
        let silent = all[1].signed();
        let answer = all[1].says(|_| ());
        assert_eq!(table.merge(all[1].peer(), answer), Merged::News);
        assert!(!suspected(&table, &all[1], NOBODY));
        assert_eq!(swept(&mut table, start + SUSPECT_FOR, 0, NOBODY), []);

        // It does not.
        assert_eq!(table.suspect(all[0].suspects(&all[1]), start), Heard::News);
        assert_eq!(swept(&mut table, start + SUSPECT_FOR, 0, NOBODY), [all[1].peer()]);
        assert!(matches!(table.merge(all[1].peer(), silent), Merged::Gone(_)), "an old entry brought it back");
        let back = all[1].says(|_| ());
        assert_eq!(table.merge(all[1].peer(), back), Merged::News, "it may not come back");
    }

    #[test]
    fn one_liar_cannot_empty_the_list() {
        for count in [5, 15, 63] {
            let all = others(count);
            let (_, mut table) = table(&all);
            let start = Instant::now();
            let liar = &all[0];
            let mut now = start;
            let mut taken = 0;
            for other in &all[1..] {
                taken += usize::from(table.suspect(liar.suspects(other), now) == Heard::News);
                now += Duration::from_millis(10);
            }
            assert_eq!(taken, ((count + 1) / 8).max(2), "of {count}");
            // Those that answer, as the living do within a second, do not leave, and the liar has to wait.
            assert_eq!(table.suspect(liar.suspects(&all[count - 1]), now), Heard::TooMany);
            // Somebody who is no member, and somebody about himself, say nothing.
            assert_eq!(table.suspect(Other::new().suspects(&all[count - 1]), now), Heard::Nothing);
        }
    }

    #[test]
    fn this_node_is_told_when_it_is_suspected_and_never_leaves_its_own_list() {
        let all = others(1);
        let (me, mut table) = table(&all);
        assert_eq!(table.suspect(all[0].suspects(&me), Instant::now()), Heard::OfMe);
        let old = Suspicion::new(&cluster(), me.entry.key, 0, &all[0].pair);
        assert_eq!(table.suspect(old, Instant::now()), Heard::Nothing);
        assert_eq!(table.remove(|_, _| true), [all[0].peer()]);
        assert_eq!(table.list(NOBODY).me().peer, me.peer());
    }

    #[test]
    fn whose_certificate_has_ended_leaves_without_a_suspicion() {
        let mut all = others(1);
        let (_, mut table) = table(&all);
        let short =
            super::super::entry::ShortCertificate { epoch: 0, not_before: 0, not_after: 100, signature: [0; 64] };
        let signed = all[0].says(|entry| entry.certificate = Some(short));
        table.merge(all[0].peer(), signed);
        assert_eq!(swept(&mut table, Instant::now(), 160, NOBODY), []);
        assert_eq!(swept(&mut table, Instant::now(), 161, |_| true), [all[0].peer()]);
    }

    /// Two tables after one exchange, each way.
    fn exchange(one: &mut Table, two: &mut Table) {
        let (first, second) = (one.buckets().to_vec(), two.buckets().to_vec());
        let differs = |bucket: usize| first[bucket] != second[bucket];
        let (give, want, _) = two.compare(differs, &one.summary(differs));
        for signed in one.entries_of(&want) {
            two.merge(peer_of(&signed.entry), (*signed).clone());
        }
        for signed in give {
            one.merge(peer_of(&signed.entry), (*signed).clone());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn two_tables_are_equal_after_one_exchange(
            steps in proptest::collection::vec((0_usize..12, any::<bool>(), any::<bool>()), 0..40),
        ) {
            let mut all = others(12);
            let (one_me, mut one) = table(&[]);
            let (two_me, mut two) = table(&[]);
            for (no, first, second) in steps {
                let signed = all[no].says(|entry| entry.full = !entry.full);
                let peer = all[no].peer();
                if first {
                    one.merge(peer, signed.clone());
                }
                if second {
                    two.merge(peer, signed);
                }
            }
            exchange(&mut one, &mut two);
            prop_assert_eq!(one.root(), two.root());
            prop_assert_eq!(one.list(NOBODY).epoch(), two.list(NOBODY).epoch());
            prop_assert!(one.get(&two_me.entry.key).is_some() && two.get(&one_me.entry.key).is_some());
        }
    }
}
