//! One exchange between two nodes, over a stream of its own.
//!
//! ```text
//! asker:  GREETING                 one word for each thing it knows
//! other:  SAME                     the end; or
//!         DIFFERS                  a word for each of 256 sets of entries, its suspicions, a newer notice
//! asker:  SUMMARY                  what it has in the sets that differ, its suspicions, a newer notice
//! other:  NEWS, as many as needed  entries that the asker lacks, and which it wants
//! asker:  NEWS, as many as needed  those
//! ```
//!
//! Whoever has something to tell at once sends NEWS instead of GREETING, and hears nothing back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use thiserror::Error;

use super::codec::{Buckets, CodecError, ENTRIES_PER_FRAME_MAX, FRAME_LEN_MAX_BYTES, Message, News};
use super::entry::Suspicion;
use super::roster::{Fault, Roster};
use super::table::MEMBERS_MAX;

/// Time for one frame to come or to be taken.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a whole exchange.
pub(crate) const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most frames of news in a row: those of the longest list, and the last.
const NEWS_FRAMES_MAX: usize = MEMBERS_MAX / ENTRIES_PER_FRAME_MAX + 2;

/// An exchange that has not come to its end.
#[derive(Debug, Error)]
pub(crate) enum SyncError {
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
    #[error("the other side sends {0}")]
    Codec(#[from] CodecError),
    #[error("the other side sends {0}")]
    Fault(#[from] Fault),
    #[error("the other side sends a message at the wrong time")]
    OutOfOrder,
    #[error("the other side sends more news than there can be")]
    TooLong,
    #[error("this node is ending")]
    Closed,
}

/// Compares everything with the other side. Not cancel safe: the stream is to be dropped then.
pub(crate) async fn compare<S>(roster: &Arc<Roster>, stream: &mut S) -> Result<(), SyncError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ours = roster.greeting();
    write(stream, &Message::Greeting(ours)).await?;
    let (theirs, buckets, news) = match read(stream).await? {
        Message::Same => {
            close(stream).await;
            return Ok(());
        }
        Message::Differs(theirs, buckets, news) => (theirs, buckets, news),
        _ => return Err(SyncError::OutOfOrder),
    };
    take(roster, news).await?;
    let (bits, known, suspicions) = {
        let table = roster.table();
        let bits = Buckets::differing(table.buckets(), &buckets);
        let suspicions = if theirs.suspicions == ours.suspicions { Vec::new() } else { table.suspicions() };
        (bits, table.summary(|bucket| bits.has(bucket)), suspicions)
    };
    let news = News { notice: roster.notice_after(theirs.notice), suspicions, ..News::default() };
    write(stream, &Message::Summary(bits, known, news)).await?;
    let (want, gone) = take_all(roster, stream, None).await?;
    let entries = roster.table().entries_of(&want);
    tell(stream, News { entries, suspicions: gone, ..News::default() }).await?;
    close(stream).await;
    Ok(())
}

/// Tells `news` and hears nothing.
pub(crate) async fn tell_only<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, news: News) -> Result<(), SyncError> {
    tell(stream, news).await?;
    close(stream).await;
    Ok(())
}

/// Answers whatever the other side has opened the stream for.
pub(crate) async fn answer<S>(roster: &Arc<Roster>, stream: &mut S) -> Result<(), SyncError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let theirs = match read(stream).await? {
        Message::Greeting(theirs) => theirs,
        Message::News(news) => {
            take_all(roster, stream, Some(news)).await?;
            return Ok(());
        }
        _ => return Err(SyncError::OutOfOrder),
    };
    let ours = roster.greeting();
    if ours == theirs {
        write(stream, &Message::Same).await?;
        close(stream).await;
        return Ok(());
    }
    let (buckets, suspicions) = {
        let table = roster.table();
        let suspicions = if theirs.suspicions == ours.suspicions { Vec::new() } else { table.suspicions() };
        (Box::new(*table.buckets()), suspicions)
    };
    let news = News { notice: roster.notice_after(theirs.notice), suspicions, ..News::default() };
    write(stream, &Message::Differs(ours, buckets, news)).await?;
    let Message::Summary(bits, known, news) = read(stream).await? else { return Err(SyncError::OutOfOrder) };
    take(roster, news).await?;
    let (entries, want, gone) = roster.table().compare(|bucket| bits.has(bucket), &known);
    tell(stream, News { entries, want, suspicions: gone, ..News::default() }).await?;
    take_all(roster, stream, None).await?;
    Ok(())
}

/// Takes news on a thread that may block.
async fn take(roster: &Arc<Roster>, news: News) -> Result<Vec<Suspicion>, SyncError> {
    if news.is_empty() {
        return Ok(Vec::new());
    }
    let roster = Arc::clone(roster);
    let taken = tokio::task::spawn_blocking(move || roster.take(news)).await;
    Ok(taken.map_err(|_| SyncError::Closed)??)
}

/// Takes frames of news to the last: what the other side wants, and suspicions of whom it has and this node knows to be
/// gone.
async fn take_all<S: AsyncRead + Unpin>(
    roster: &Arc<Roster>,
    stream: &mut S,
    first: Option<News>,
) -> Result<(Vec<u64>, Vec<Suspicion>), SyncError> {
    let mut gone = Vec::new();
    let mut first = first;
    for _ in 0..NEWS_FRAMES_MAX {
        let mut news = match first.take() {
            Some(news) => news,
            None => match read(stream).await? {
                Message::News(news) => news,
                _ => return Err(SyncError::OutOfOrder),
            },
        };
        let (more, want) = (news.more, std::mem::take(&mut news.want));
        gone.extend(take(roster, news).await?);
        if !more {
            gone.truncate(super::table::SUSPICIONS_MAX);
            return Ok((want, gone));
        }
    }
    Err(SyncError::TooLong)
}

async fn tell<S: AsyncWrite + Unpin>(stream: &mut S, news: News) -> Result<(), SyncError> {
    for frame in news.in_frames() {
        write(stream, &Message::News(frame)).await?;
    }
    Ok(())
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, message: &Message) -> Result<(), SyncError> {
    let frame = message.encode();
    let written = async {
        stream.write_all(&frame).await?;
        stream.flush().await
    };
    tokio::time::timeout(FRAME_TIMEOUT, written).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(())
}

async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Message, SyncError> {
    let whole = async {
        let mut head = [0; 4];
        stream.read_exact(&mut head).await?;
        let len = u32::from_le_bytes(head) as usize;
        if len == 0 || len > FRAME_LEN_MAX_BYTES {
            return Err(SyncError::Codec(CodecError::FrameLength(len)));
        }
        let mut frame = vec![0; len];
        stream.read_exact(&mut frame).await?;
        Ok(Message::decode(&frame)?)
    };
    tokio::time::timeout(FRAME_TIMEOUT, whole).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Best effort: the stream is dropped next, which resets it if this did not work.
async fn close<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let ended = async {
        let _ = stream.close().await;
        // What was written is taken when the other side has closed too; a stream that is dropped may lose it.
        let _ = stream.read(&mut [0]).await;
    };
    let _ = tokio::time::timeout(FRAME_TIMEOUT, ended).await;
}

#[cfg(test)]
mod tests {
    use futures::AsyncWriteExt as _;
    use libp2p::identity::ed25519;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::super::codec::Greeting;
    use super::super::entry::tests::{cluster, said};
    use super::super::scale::{closed_roster, open_roster};
    use super::*;

    /// What comes of an exchange that a peer has opened which sends `bytes` and hears nothing.
    async fn answered(bytes: &[u8]) -> Result<(), SyncError> {
        let roster = open_roster();
        let (near, far) = tokio::io::duplex(4 << 20);
        let (mut near, mut far) = (near.compat(), far.compat());
        far.write_all(bytes).await.expect("there is room");
        let outcome = answer(&roster, &mut near).await;
        assert_eq!(roster.table().list(|_| false).count(), 1, "something hostile was taken");
        outcome
    }

    fn telling(news: News) -> Vec<u8> {
        Message::News(news).encode()
    }

    #[tokio::test]
    async fn frames_that_cannot_be_end_the_exchange() {
        for len in [0_u32, (1 << 20) + 1, u32::MAX] {
            let error = answered(&len.to_le_bytes()).await.expect_err("refused");
            assert!(matches!(error, SyncError::Codec(CodecError::FrameLength(_))), "{error}");
        }
        let error = answered(&[1, 0, 0, 0, 99]).await.expect_err("refused");
        assert!(matches!(error, SyncError::Codec(CodecError::Type(99))), "{error}");
        assert!(matches!(answered(&Message::Same.encode()).await, Err(SyncError::OutOfOrder)));
        let greeting = Greeting { root: 0, suspicions: 0, notice: 0 };
        let twice = [Message::Greeting(greeting).encode(), Message::Greeting(greeting).encode()].concat();
        assert!(matches!(answered(&twice).await, Err(SyncError::OutOfOrder)));
    }

    #[tokio::test]
    async fn what_is_not_signed_by_whom_it_is_about_ends_the_exchange() {
        let (_, entry) = said(1);
        let forged = Arc::new(entry.clone().sign(&cluster(), &ed25519::Keypair::generate()));
        let error = answered(&telling(News { entries: vec![forged], ..News::default() })).await.expect_err("refused");
        assert!(matches!(error, SyncError::Fault(Fault::Entry)), "{error}");
        let elsewhere = "other".parse().expect("a cluster id");
        let (pair, entry) = said(1);
        let foreign = Arc::new(entry.sign(&elsewhere, &pair));
        let error = answered(&telling(News { entries: vec![foreign], ..News::default() })).await.expect_err("refused");
        assert!(matches!(error, SyncError::Fault(Fault::Entry)), "{error}");
    }

    #[test]
    fn a_suspicion_in_anothers_name_is_a_fault() {
        let roster = open_roster();
        let own = roster.table().own().clone();
        let mut out = crate::canonical::Writer::default();
        let (pair, entry) = said(1);
        Suspicion::new(&cluster(), own.entry.key, own.entry.incarnation, &pair).encode(&mut out);
        let mut bytes = out.finish();
        let genuine = Suspicion::decode(&mut crate::canonical::Reader::new(&bytes)).expect("reads");
        // The reporter follows the target and the incarnation.
        bytes[40..72].copy_from_slice(&said(1).1.key.0);
        let framed = Suspicion::decode(&mut crate::canonical::Reader::new(&bytes)).expect("reads");
        let telling = |said: Suspicion| News { suspicions: vec![said], ..News::default() };
        assert_eq!(roster.take(telling(framed)), Err(Fault::Suspicion));
        assert_eq!(roster.table().own().entry.incarnation, own.entry.incarnation);
        assert_eq!(roster.take(telling(genuine)), Ok(Vec::new()));
        assert!(roster.table().own().entry.incarnation > own.entry.incarnation, "{:?} is not answered", entry.key);
    }

    #[test]
    fn who_has_no_certificate_is_no_member_of_a_closed_swarm() {
        let roster = closed_roster();
        let (pair, entry) = said(1);
        let signed = Arc::new(entry.sign(&cluster(), &pair));
        assert_eq!(roster.take(News { entries: vec![signed], ..News::default() }), Ok(Vec::new()));
        assert_eq!(roster.table().list(|_| false).count(), 1);
    }

    #[tokio::test]
    async fn news_without_end_are_cut_short() {
        let more = telling(News { more: true, ..News::default() });
        let endless: Vec<u8> = more.iter().copied().cycle().take(more.len() * 100).collect();
        assert!(matches!(answered(&endless).await, Err(SyncError::TooLong)));
    }
}
