//! What the exchange is compared with: a TCP connection that carries the bytes alone, plain or encrypted.
//!
//! The encrypted one has the records of Noise as libp2p makes them (ChaChaPoly by way of `snow` and `ring`, a length of two
//! bytes before each), of the greatest length that Noise has, encrypted from and into buffers that are made once. Keys are
//! constants: a handshake happens once in a connection's life and is no part of its speed. There is no multiplexing, no
//! frame, no check of chunks and no second copy, so it is the most that this encryption allows.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use snow::params::CipherChoice;
use snow::resolvers::{CryptoResolver as _, RingResolver};
use snow::types::Cipher;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::cores::Side;

/// Bytes that are written at once where nothing is encrypted: a chunk.
const WRITE_LEN_BYTES: usize = 64 * 1024;
/// Length of what authenticates a record.
const TAG_LEN_BYTES: usize = 16;
/// Length of a record's own length.
const HEAD_LEN_BYTES: usize = 2;
/// Longest content of a record: Noise's messages have at most 65,535 bytes.
const RECORD_LEN_MAX_BYTES: usize = 65_535 - TAG_LEN_BYTES;

/// Whether records are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    /// Bytes as they are.
    Plain,
    /// Records of Noise.
    Encrypted,
}

/// A connection of the asker's side to a task on the holder's.
pub(super) struct Raw {
    stream: Option<TcpStream>,
    wire: Wire,
}

impl Raw {
    /// Connects `asker` to `holder`, which sends from `bytes`.
    pub(super) fn connect(holder: &Side, asker: &Side, bytes: Arc<Vec<u8>>, wire: Wire) -> anyhow::Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = holder.run(async move { Ok(TcpListener::bind(any).await?) })?;
        let address = listener.local_addr()?;
        holder.spawn(serve(listener, bytes, wire));
        let stream = asker.run(async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })?;
        Ok(Self { stream: Some(stream), wire })
    }

    /// Reads `len_bytes`.
    pub(super) fn read(&mut self, asker: &Side, len_bytes: usize) -> anyhow::Result<()> {
        let mut stream = self.stream.take().context("the connection broke earlier")?;
        let wire = self.wire;
        self.stream = Some(asker.run(async move {
            stream.write_u64(len_bytes as u64).await?;
            match wire {
                Wire::Plain => read_plain(&mut stream, len_bytes).await?,
                Wire::Encrypted => read_records(&mut stream, len_bytes).await?,
            }
            Ok(stream)
        })?);
        Ok(())
    }

    /// Seconds of each of `count` round trips of a few bytes.
    pub(super) fn round_trips(&mut self, asker: &Side, count: usize) -> anyhow::Result<Vec<f64>> {
        let mut stream = self.stream.take().context("the connection broke earlier")?;
        let (stream, seconds) = asker.run(async move {
            let mut seconds = Vec::with_capacity(count);
            for _ in 0..count {
                let start = Instant::now();
                stream.write_u64(0).await?;
                stream.read_u8().await?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            Ok((stream, seconds))
        })?;
        self.stream = Some(stream);
        Ok(seconds)
    }
}

/// Answers each length with as many bytes, and none with one byte.
async fn serve(listener: TcpListener, bytes: Arc<Vec<u8>>, wire: Wire) -> anyhow::Result<()> {
    let (mut stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    let (cipher, mut nonce) = (cipher()?, 0);
    let mut record = vec![0; HEAD_LEN_BYTES + RECORD_LEN_MAX_BYTES + TAG_LEN_BYTES];
    // The asker ends it by going.
    while let Ok(len) = stream.read_u64().await {
        if len == 0 {
            stream.write_u8(0).await?;
        }
        let mut left = usize::try_from(len)?;
        let mut at = 0;
        if wire == Wire::Encrypted {
            nonce = 0;
        }
        while left > 0 {
            let longest = if wire == Wire::Plain { WRITE_LEN_BYTES } else { RECORD_LEN_MAX_BYTES };
            let piece = &bytes[at..bytes.len().min(at + longest.min(left))];
            match wire {
                Wire::Plain => stream.write_all(piece).await?,
                Wire::Encrypted => {
                    let len = cipher.encrypt(nonce, &[], piece, &mut record[HEAD_LEN_BYTES..]);
                    record[..HEAD_LEN_BYTES].copy_from_slice(&u16::try_from(len)?.to_be_bytes());
                    nonce += 1;
                    stream.write_all(&record[..HEAD_LEN_BYTES + len]).await?;
                }
            }
            left -= piece.len();
            at = (at + piece.len()) % bytes.len();
        }
    }
    Ok(())
}

async fn read_plain(stream: &mut TcpStream, len_bytes: usize) -> anyhow::Result<()> {
    let mut buffer = vec![0; WRITE_LEN_BYTES];
    let mut left = len_bytes;
    while left > 0 {
        let len = buffer.len().min(left);
        left -= stream.read_exact(&mut buffer[..len]).await?;
    }
    Ok(())
}

async fn read_records(stream: &mut TcpStream, len_bytes: usize) -> anyhow::Result<()> {
    let (cipher, mut nonce) = (cipher()?, 0);
    let mut plain = vec![0; RECORD_LEN_MAX_BYTES];
    // Several records are read with one call, as libp2p's own reader does it.
    let mut buffer = vec![0; 4 * (HEAD_LEN_BYTES + RECORD_LEN_MAX_BYTES + TAG_LEN_BYTES)];
    let (mut filled, mut left) = (0, len_bytes);
    while left > 0 {
        let read = stream.read(&mut buffer[filled..]).await?;
        anyhow::ensure!(read > 0, "the other side closed the connection");
        filled += read;
        let mut at = 0;
        while let Some(len) = whole_record(&buffer[at..filled]) {
            let body = &buffer[at + HEAD_LEN_BYTES..at + HEAD_LEN_BYTES + len];
            let opened = cipher.decrypt(nonce, &[], body, &mut plain);
            left -= opened.map_err(|error| anyhow::anyhow!("a record does not open: {error}"))?;
            nonce += 1;
            at += HEAD_LEN_BYTES + len;
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
    Ok(())
}

/// The length of the first record's body, if all of it is in `bytes`.
fn whole_record(bytes: &[u8]) -> Option<usize> {
    let head = bytes.first_chunk::<HEAD_LEN_BYTES>()?;
    let len = usize::from(u16::from_be_bytes(*head));
    (bytes.len() >= HEAD_LEN_BYTES + len).then_some(len)
}

fn cipher() -> anyhow::Result<Box<dyn Cipher>> {
    let mut cipher = RingResolver.resolve_cipher(&CipherChoice::ChaChaPoly).context("ring has no ChaChaPoly")?;
    cipher.set(&[7; 32]);
    Ok(cipher)
}
