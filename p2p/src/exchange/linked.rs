//! Streams that break when the connection below them is gone.
//!
//! Yamux wakes whoever waits for a stream when the other end closes the connection, but not when this end does (0.14,
//! `connection/closing.rs`): a question to a peer whose certificate is taken back meanwhile would wait for the stall timeout. What is
//! asked of a peer ends in the same way when that is banned, which leaves the connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A stream that breaks when `gone` is cancelled. What has arrived before can still be read.
#[derive(Debug)]
pub(crate) struct Linked<S> {
    stream: S,
    gone: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Linked<S> {
    /// `stream` until `gone`.
    pub(crate) fn new(stream: S, gone: CancellationToken) -> Self {
        Self { stream, gone: Box::pin(gone.cancelled_owned()) }
    }

    /// `polled`, or the end when there is nothing to wait for any more.
    fn unless_gone<T>(&mut self, polled: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_pending() && self.gone.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Linked<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.unless_gone(polled, context)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Linked<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.unless_gone(polled, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.unless_gone(polled, context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_close(context);
        self.unless_gone(polled, context)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::compat::TokioAsyncReadCompatExt as _;

    use super::*;

    #[tokio::test]
    async fn what_came_before_the_end_is_read_and_then_it_breaks() {
        let (near, far) = tokio::io::duplex(64);
        let gone = CancellationToken::new();
        let mut stream = Linked::new(near.compat(), gone.clone());
        let mut far = far.compat();
        far.write_all(b"told").await.unwrap();
        gone.cancel();
        let mut told = [0; 4];
        stream.read_exact(&mut told).await.unwrap();
        assert_eq!(&told, b"told");
        let error = stream.read(&mut told).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn who_waits_already_is_woken() {
        let (near, _far) = tokio::io::duplex(64);
        let gone = CancellationToken::new();
        let mut stream = Linked::new(near.compat(), gone.clone());
        let waiting = tokio::spawn(async move { stream.read(&mut [0; 4]).await.map_err(|error| error.kind()) });
        tokio::task::yield_now().await;
        gone.cancel();
        assert_eq!(waiting.await.unwrap(), Err(io::ErrorKind::ConnectionAborted));
    }
}
