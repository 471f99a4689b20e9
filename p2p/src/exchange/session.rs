//! Frames over a stream, within limits of length and time.
//!
//! Not cancel safe in the middle of a frame: a session whose read or write was dropped is out of step and must not be
//! used again. Its owners drop it then, which resets the stream.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use thiserror::Error;
use tokio::time::{Instant, timeout, timeout_at};

use super::codec::{CodecError, LENGTH_LEN_BYTES, frame_len};

/// Why a session cannot go on.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The stream broke, also in the middle of a frame.
    #[error("the stream broke")]
    Io(#[from] io::Error),
    /// The other side sent what is no message.
    #[error("the other side broke the protocol")]
    Codec(#[from] CodecError),
    /// The other side was silent or slow for too long.
    #[error("the other side took too long")]
    Stalled,
    /// The other side closed the stream between two frames.
    #[error("the other side closed the stream")]
    Closed,
}

/// One stream as a sequence of frames.
#[derive(Debug)]
pub struct Session<S> {
    stream: S,
    /// The first byte of the next frame, if [`Self::gone`] has met it.
    ahead: Option<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// Frames over `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream, ahead: None }
    }

    /// The next frame without its length. It must begin before `first_by`, and be complete `rest` later.
    ///
    /// # Errors
    /// When the stream ends or breaks, the frame is longer than `limit_bytes`, or time runs out.
    pub async fn read_frame(
        &mut self,
        limit_bytes: usize,
        first_by: Instant,
        rest: Duration,
    ) -> Result<Bytes, SessionError> {
        let mut head = [0; LENGTH_LEN_BYTES];
        let begun = match self.ahead.take() {
            Some(byte) => {
                head[0] = byte;
                1
            }
            None => timeout_at(first_by, self.stream.read(&mut head)).await.map_err(|_| SessionError::Stalled)??,
        };
        if begun == 0 {
            return Err(SessionError::Closed);
        }
        timeout(rest, self.finish_frame(head, begun, limit_bytes)).await.map_err(|_| SessionError::Stalled)?
    }

    async fn finish_frame(
        &mut self,
        mut head: [u8; LENGTH_LEN_BYTES],
        begun: usize,
        limit_bytes: usize,
    ) -> Result<Bytes, SessionError> {
        self.stream.read_exact(&mut head[begun..]).await?;
        let len = frame_len(head, limit_bytes)?;
        let mut frame = BytesMut::zeroed(len);
        self.stream.read_exact(&mut frame).await?;
        Ok(frame.freeze())
    }

    /// Writes whole frames and hands them to the transport, within `within`.
    ///
    /// # Errors
    /// When the stream breaks, or the other side does not take them in time.
    pub async fn write_frames(&mut self, frames: &[u8], within: Duration) -> Result<(), SessionError> {
        let written = async {
            self.stream.write_all(frames).await?;
            self.stream.flush().await
        };
        timeout(within, written).await.map_err(|_| SessionError::Stalled)??;
        Ok(())
    }

    /// Ends when the other side sends anything or closes the stream; true when it closed it.
    ///
    /// Cancel safe: a byte that is read here ends the session anyway.
    pub async fn interrupted(&mut self) -> bool {
        if self.ahead.is_some() {
            return false;
        }
        let mut byte = [0];
        !matches!(self.stream.read(&mut byte).await, Ok(1..))
    }

    /// Ends when the other side closes or resets the stream. What it sends instead is not lost, but hides the end until
    /// the next write, which then fails.
    ///
    /// Cancel safe: a byte that is read here is the first of the next frame.
    pub async fn gone(&mut self) {
        if self.ahead.is_none() {
            let mut byte = [0];
            match self.stream.read(&mut byte).await {
                Ok(1..) => self.ahead = Some(byte[0]),
                Ok(0) | Err(_) => return,
            }
        }
        std::future::pending().await
    }

    /// Says that nothing more will be written. Best effort.
    pub async fn close(&mut self, within: Duration) {
        // The stream is dropped next, which resets it if this did not work.
        let _ = timeout(within, self.stream.close()).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// Gives `bytes` to a reader and closes the stream.
    async fn read(bytes: &[u8], limit_bytes: usize) -> Result<Bytes, SessionError> {
        let (near, far) = tokio::io::duplex(64);
        let mut writer = Session::new(far.compat());
        let mut reader = Session::new(near.compat());
        let write = async {
            // The reader may have left, which is what some of these tests are about.
            let _ = writer.write_frames(bytes, SOON).await;
            writer.close(SOON).await;
        };
        let (frame, ()) = tokio::join!(reader.read_frame(limit_bytes, Instant::now() + SOON, SOON), write);
        frame
    }

    #[tokio::test]
    async fn a_frame_longer_than_the_pipe_arrives_whole() {
        let mut bytes = 1000_u32.to_le_bytes().to_vec();
        bytes.extend((0..1000_u32).map(|no| no as u8));
        assert_eq!(read(&bytes, 1000).await.expect("a frame"), bytes[4..]);
        let error = read(&bytes, 999).await.expect_err("too long");
        assert!(matches!(error, SessionError::Codec(CodecError::FrameLength { len_bytes: 1000, .. })), "{error:?}");
    }

    #[tokio::test]
    async fn the_end_of_the_stream_is_told_apart_from_a_broken_frame() {
        assert!(matches!(read(&[], 10).await, Err(SessionError::Closed)));
        for cut in [&[1, 0][..], &[2, 0, 0, 0, 7]] {
            let error = read(cut, 10).await.expect_err("cut short");
            assert!(matches!(&error, SessionError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof));
        }
    }

    #[tokio::test]
    async fn silence_and_trickle_are_stalls() {
        let short = Duration::from_millis(30);
        let (near, mut far) = tokio::io::duplex(64);
        let mut reader = Session::new(near.compat());
        let silent = reader.read_frame(10, Instant::now() + short, SOON).await;
        assert!(matches!(silent, Err(SessionError::Stalled)));
        tokio::io::AsyncWriteExt::write_all(&mut far, &[2, 0, 0, 0, 7]).await.expect("writes");
        let trickle = reader.read_frame(10, Instant::now() + SOON, short).await;
        assert!(matches!(trickle, Err(SessionError::Stalled)));
    }

    #[tokio::test]
    async fn the_end_is_noticed_and_a_frame_that_comes_instead_is_not_lost() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut reader = Session::new(near.compat());
        assert!(futures::poll!(Box::pin(reader.gone())).is_pending());
        tokio::io::AsyncWriteExt::write_all(&mut far, &[2, 0, 0, 0, 7, 8]).await.expect("writes");
        for _ in 0..2 {
            assert!(futures::poll!(Box::pin(reader.gone())).is_pending(), "took a request for the end");
        }
        let frame = reader.read_frame(10, Instant::now() + SOON, SOON).await.expect("a frame");
        assert_eq!(*frame, [7, 8]);
        drop(far);
        reader.gone().await;
    }
}
