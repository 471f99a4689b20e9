//! What a node says about itself, and what others say about it.
//!
//! An **entry** is signed by the node that it is about, so nobody can speak for another. It carries the node's
//! certificate without the fields that the entry has anyway, and a number (the *incarnation*) that grows whenever the
//! node says something new; of two entries the higher number counts. A **suspicion** names a node, the incarnation that
//! did not answer, and the node that has tried; the latter signs it, so that nobody can put it in another's name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libp2p::identity::ed25519;
use libp2p::{Multiaddr, PeerId};

use crate::address::{ADDRESSES_PER_PEER_MAX, multiaddr_of, socket_of};
use crate::admission::certificate::{Certificate, SignedCertificate, Zone};
use crate::canonical::{DecodeError, PeerKey, Reader, SIGNATURE_LEN_BYTES, Writer, sign};
use crate::config::ClusterId;

const VERSION: u8 = 1;
const ENTRY_DOMAIN: &[u8] = b"hermes member entry v1\0";
const SUSPICION_DOMAIN: &[u8] = b"hermes member suspicion v1\0";
/// Longest encoded entry: eight IPv6 addresses, the longest zone, a certificate.
pub(crate) const ENTRY_LEN_MAX_BYTES: usize = 1 + 32 + 1 + 19 * ADDRESSES_PER_PEER_MAX + 64 + 1 + 8 + 1 + 88 + 64;
/// Length of an encoded suspicion.
pub(crate) const SUSPICION_LEN_BYTES: usize = 32 + 8 + 32 + SIGNATURE_LEN_BYTES;

const FLAG_DRAIN: u8 = 1;
const FLAG_FULL: u8 = 2;

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: PeerKey,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) zone: Zone,
    pub(crate) drain: bool,
    pub(crate) full: bool,
    pub(crate) incarnation: u64,
    /// None in an open swarm.
    pub(crate) certificate: Option<ShortCertificate>,
}

/// A certificate without what its entry says anyway: cluster, peer and zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShortCertificate {
    pub(crate) epoch: u64,
    pub(crate) not_before: u64,
    pub(crate) not_after: u64,
    pub(crate) signature: [u8; SIGNATURE_LEN_BYTES],
}

impl ShortCertificate {
    pub(crate) fn of(signed: &SignedCertificate) -> Self {
        let said = &signed.said;
        let (epoch, not_before, not_after) = (said.epoch, said.not_before, said.not_after);
        Self { epoch, not_before, not_after, signature: signed.signature }
    }
}

impl Entry {
    /// Whether others should hear of it at once, compared with `old`: all but a renewed certificate.
    pub(crate) fn is_news_after(&self, old: &Self) -> bool {
        (&self.addresses, &self.zone, self.drain, self.full) != (&old.addresses, &old.zone, old.drain, old.full)
    }

    /// The certificate as its issuer has signed it.
    pub(crate) fn certificate(&self, cluster: &ClusterId, peer: PeerId) -> Option<SignedCertificate> {
        let short = self.certificate.as_ref()?;
        let certificate = Certificate {
            cluster: cluster.clone(),
            peer,
            zone: self.zone.clone(),
            epoch: short.epoch,
            not_before: short.not_before,
            not_after: short.not_after,
        };
        Some(SignedCertificate { said: certificate, signature: short.signature })
    }

    pub(crate) fn multiaddrs(&self) -> Vec<Multiaddr> {
        self.addresses.iter().copied().map(multiaddr_of).collect()
    }

    fn body(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(VERSION).bytes(&self.key.0);
        out.u8(u8::try_from(self.addresses.len()).expect("at most ADDRESSES_PER_PEER_MAX"));
        for address in &self.addresses {
            match address.ip() {
                IpAddr::V4(ip) => out.u8(4).bytes(&ip.octets()),
                IpAddr::V6(ip) => out.u8(6).bytes(&ip.octets()),
            };
            out.u16(address.port());
        }
        out.short(self.zone.as_str().as_bytes());
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        out.u8(flag(self.drain, FLAG_DRAIN) | flag(self.full, FLAG_FULL)).u64(self.incarnation);
        match &self.certificate {
            None => out.u8(0),
            Some(short) => {
                out.u8(1).u64(short.epoch).u64(short.not_before).u64(short.not_after).bytes(&short.signature)
            }
        };
        out.finish()
    }

    /// Signs it with the key of the node that it is about.
    pub(crate) fn sign(self, cluster: &ClusterId, pair: &ed25519::Keypair) -> SignedEntry {
        let mut encoded = self.body();
        let signature = sign(pair, ENTRY_DOMAIN, &in_cluster(cluster, &encoded));
        encoded.extend_from_slice(&signature);
        SignedEntry { entry: self, encoded: encoded.into() }
    }
}

/// What is signed names the cluster, which every node knows; what is sent does not.
fn in_cluster(cluster: &ClusterId, body: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    out.short(cluster.as_str().as_bytes()).bytes(body);
    out.finish()
}

/// The addresses of `claimed` that can stand in an entry.
pub(crate) fn sockets_of(claimed: &[Multiaddr]) -> Vec<SocketAddr> {
    let usable = |socket: &SocketAddr| !socket.ip().is_unspecified() && socket.port() != 0;
    let sockets: std::collections::BTreeSet<SocketAddr> = claimed.iter().filter_map(socket_of).filter(usable).collect();
    sockets.into_iter().take(ADDRESSES_PER_PEER_MAX).collect()
}

/// An entry and the bytes that its node has signed; the signature is checked by [`Self::is_genuine`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedEntry {
    pub(crate) entry: Entry,
    pub(crate) encoded: Box<[u8]>,
}

impl SignedEntry {
    /// Reads one, and nothing else.
    ///
    /// # Errors
    /// When the bytes are too many or not of that form.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Reader::versioned(bytes, ENTRY_LEN_MAX_BYTES, VERSION)?;
        let key = PeerKey(fields.array()?);
        let count = usize::from(fields.u8()?);
        if count > ADDRESSES_PER_PEER_MAX {
            return Err(DecodeError::Field("addresses"));
        }
        let mut addresses: Vec<SocketAddr> = Vec::with_capacity(count);
        for _ in 0..count {
            let address = read_address(&mut fields)?;
            if addresses.last().is_some_and(|last| *last >= address) {
                return Err(DecodeError::Field("addresses"));
            }
            addresses.push(address);
        }
        let zone = fields.parsed("zone")?;
        let flags = fields.u8()?;
        if flags & !(FLAG_DRAIN | FLAG_FULL) != 0 {
            return Err(DecodeError::Field("flags"));
        }
        let incarnation = fields.u64()?;
        let certificate = match fields.u8()? {
            0 => None,
            1 => Some(ShortCertificate {
                epoch: fields.u64()?,
                not_before: fields.u64()?,
                not_after: fields.u64()?,
                signature: fields.array()?,
            }),
            _ => return Err(DecodeError::Field("certificate")),
        };
        fields.bytes(SIGNATURE_LEN_BYTES)?;
        fields.end()?;
        let (drain, full) = (flags & FLAG_DRAIN != 0, flags & FLAG_FULL != 0);
        let entry = Entry { key, addresses, zone, drain, full, incarnation, certificate };
        Ok(Self { entry, encoded: bytes.into() })
    }

    /// Whether the node that it is about has signed it in `cluster`.
    pub fn is_genuine(&self, cluster: &ClusterId) -> bool {
        let Some((body, signature)) = self.encoded.split_last_chunk::<SIGNATURE_LEN_BYTES>() else { return false };
        self.entry.key.has_signed(ENTRY_DOMAIN, &in_cluster(cluster, body), signature)
    }

    /// The bytes that its node has signed, with the signature.
    pub fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    /// What tells this entry from every other, in one word.
    pub(crate) fn fingerprint(&self) -> u64 {
        word_of(&self.encoded)
    }
}

/// The first word of a hash.
pub(crate) fn word_of(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let (word, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*word)
}

fn read_address(fields: &mut Reader<'_>) -> Result<SocketAddr, DecodeError> {
    let ip: IpAddr = match fields.u8()? {
        4 => Ipv4Addr::from(fields.array::<4>()?).into(),
        6 => Ipv6Addr::from(fields.array::<16>()?).into(),
        _ => return Err(DecodeError::Field("addresses")),
    };
    let port = fields.u16()?;
    if port == 0 || ip.is_unspecified() {
        return Err(DecodeError::Field("addresses"));
    }
    Ok(SocketAddr::new(ip, port))
}

/// Somebody could not reach a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspicion {
    /// Whom.
    pub(crate) target: PeerKey,
    /// As of which of its entries.
    pub(crate) incarnation: u64,
    /// Who has tried.
    pub(crate) reporter: PeerKey,
    signature: [u8; SIGNATURE_LEN_BYTES],
}

impl Suspicion {
    /// The node of `pair` could not reach `target`.
    pub(crate) fn new(cluster: &ClusterId, target: PeerKey, incarnation: u64, pair: &ed25519::Keypair) -> Self {
        let reporter = PeerKey(pair.public().to_bytes());
        let mut said = Self { target, incarnation, reporter, signature: [0; SIGNATURE_LEN_BYTES] };
        said.signature = sign(pair, SUSPICION_DOMAIN, &in_cluster(cluster, &said.body()));
        said
    }

    fn body(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes(&self.target.0).u64(self.incarnation).bytes(&self.reporter.0);
        out.finish()
    }

    /// Whether its reporter has signed it in `cluster`.
    pub(crate) fn is_genuine(&self, cluster: &ClusterId) -> bool {
        self.reporter.has_signed(SUSPICION_DOMAIN, &in_cluster(cluster, &self.body()), &self.signature)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.bytes(&self.body()).bytes(&self.signature);
    }

    pub(crate) fn decode(fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            target: PeerKey(fields.array()?),
            incarnation: fields.u64()?,
            reporter: PeerKey(fields.array()?),
            signature: fields.array()?,
        })
    }

    /// What it is about, in one word; the same whoever reports it.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut out = Writer::default();
        out.bytes(&self.target.0).u64(self.incarnation);
        word_of(&out.finish())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn cluster() -> ClusterId {
        "test".parse().expect("a cluster id")
    }

    /// A node and what it says about itself.
    pub(crate) fn said(incarnation: u64) -> (ed25519::Keypair, Entry) {
        let pair = ed25519::Keypair::generate();
        let entry = Entry {
            key: PeerKey(pair.public().to_bytes()),
            addresses: vec!["10.0.0.1:4001".parse().expect("an address")],
            zone: "a".parse().expect("a zone"),
            drain: false,
            full: false,
            incarnation,
            certificate: None,
        };
        (pair, entry)
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_no_byte_can_change() {
        let (pair, mut entry) = said(7);
        entry.addresses.push("[fd00::1]:9".parse().expect("an address"));
        entry.full = true;
        entry.certificate =
            Some(ShortCertificate { epoch: 1, not_before: 2, not_after: 3, signature: [9; SIGNATURE_LEN_BYTES] });
        let signed = entry.sign(&cluster(), &pair);
        assert!(signed.is_genuine(&cluster()));
        assert!(!signed.is_genuine(&"prod".parse().expect("a cluster id")), "good in another cluster");
        assert_eq!(SignedEntry::decode(&signed.encoded), Ok(signed.clone()));
        for at in 0..signed.encoded.len() {
            let mut bad = signed.encoded.to_vec();
            bad[at] ^= 1;
            assert!(!SignedEntry::decode(&bad).is_ok_and(|read| read.is_genuine(&cluster())), "byte {at}");
            assert!(SignedEntry::decode(&signed.encoded[..at]).is_err());
        }
    }

    #[test]
    fn the_longest_entry_fits_and_one_more_address_does_not() {
        let (pair, mut entry) = said(1);
        entry.addresses = (1..=8).map(|no| SocketAddr::new(Ipv6Addr::LOCALHOST.into(), no)).collect();
        entry.zone = "z".repeat(63).parse().expect("a zone");
        entry.certificate =
            Some(ShortCertificate { epoch: 1, not_before: 2, not_after: 3, signature: [9; SIGNATURE_LEN_BYTES] });
        let signed = entry.clone().sign(&cluster(), &pair);
        assert!(signed.encoded.len() <= ENTRY_LEN_MAX_BYTES, "{}", signed.encoded.len());
        assert!(SignedEntry::decode(&signed.encoded).is_ok());
        entry.addresses.push("[::1]:9".parse().expect("an address"));
        assert!(SignedEntry::decode(&entry.sign(&cluster(), &pair).encoded).is_err());
    }

    #[test]
    fn a_suspicion_is_its_reporters_own() {
        let (pair, _) = said(1);
        let said = Suspicion::new(&cluster(), PeerKey([1; 32]), 5, &pair);
        assert!(said.is_genuine(&cluster()));
        let mut out = Writer::default();
        said.encode(&mut out);
        let bytes = out.finish();
        assert_eq!(bytes.len(), SUSPICION_LEN_BYTES);
        assert_eq!(Suspicion::decode(&mut Reader::new(&bytes)), Ok(said.clone()));
        let framed = Suspicion { reporter: PeerKey([2; 32]), ..said };
        assert!(!framed.is_genuine(&cluster()), "said in another's name");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            if let Ok(read) = SignedEntry::decode(&bytes) {
                prop_assert_eq!(&*read.encoded, &bytes[..]);
            }
        }
    }
}
