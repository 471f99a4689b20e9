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
        Message::Same => return Ok(()),
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
