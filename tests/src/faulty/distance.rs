//! A registry that is far away: what either side sends arrives so much later, in order.
//!
//! Each connection is relayed: what is read of it waits for its time in a bounded queue. Connections are made without
//! delay, since the kernel does that.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Bytes that are read at once.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces under way in one direction: 4 MiB, what a link of 300 Mbit/s holds in 100 ms.
const PIECES: usize = 256;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Client(pub(super) IpAddr);

impl Connected<IncomingStream<'_, TcpListener>> for Client {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.remote_addr().ip())
    }
}

impl Connected<IncomingStream<'_, Distant>> for Client {
    fn connect_info(stream: IncomingStream<'_, Distant>) -> Self {
        Self(stream.remote_addr().ip())
    }
}

/// Takes connections whose bytes arrive late.
#[derive(Debug)]
pub(super) struct Distant {
    pub(super) listener: TcpListener,
    /// In each direction.
    pub(super) delay: Duration,
}

impl Listener for Distant {
    type Io = DuplexStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (DuplexStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let (near, far) = tokio::io::duplex(PIECE_BYTES);
        tokio::spawn(relay(stream, far, self.delay));
        (near, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Ends with the connection, whichever side closes it.
async fn relay(stream: TcpStream, far: DuplexStream, delay: Duration) {
    // Small answers must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let (from_client, to_client) = stream.into_split();
    let (from_server, to_server) = tokio::io::split(far);
    tokio::join!(carry(from_client, to_server, delay), carry(from_server, to_client, delay));
}

/// Carries one direction; the end of `from` arrives late, too.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Bytes)>(PIECES);
    let gather = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE_BYTES);
            match from.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            if sender.send((Instant::now() + delay, buffer.split().freeze())).await.is_err() {
                break;
            }
        }
    };
    let hand_over = async move {
        while let Some((due, piece)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(gather, hand_over);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_arrive_late_in_order_and_whole() {
        let (mut near, from) = tokio::io::duplex(PIECE_BYTES);
        let (to, mut far) = tokio::io::duplex(PIECE_BYTES);
        let delay = Duration::from_millis(50);
        let begun = Instant::now();
        let carried = tokio::spawn(carry(from, to, delay));
        let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let copy = sent.clone();
        let sender = tokio::spawn(async move {
            near.write_all(&copy).await.expect("it is taken");
        });
        let mut first = [0; 1];
        far.read_exact(&mut first).await.expect("a byte");
        assert!(begun.elapsed() >= delay, "{:?}", begun.elapsed());
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.expect("all of it");
        sender.await.expect("it has sent all");
        carried.await.expect("it has carried all");
        assert!(first[..] == sent[..1] && rest == sent[1..]);
    }
}
