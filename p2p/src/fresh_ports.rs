//! A transport that dials from a fresh port every time.
//!
//! libp2p dials from the port that it listens on, for the sake of nodes behind NAT. When two nodes then dial each other
//! at the same moment, which is what nodes that start together do, TCP joins the two dials into one connection whose ends
//! both take themselves for the dialler, and the handshake fails on both. Cluster networks need no such help.

use std::pin::Pin;
use std::task::{Context, Poll};

use libp2p::Multiaddr;
use libp2p::core::transport::{DialOpts, ListenerId, PortUse, Transport, TransportError, TransportEvent};

/// `inner`, but for the port that it dials from.
pub(crate) struct FreshPorts<T> {
    inner: T,
}

impl<T> FreshPorts<T> {
    /// Dials as `inner` does, from fresh ports.
    pub(crate) fn new(inner: T) -> Self {
        Self { inner }
    }
}

impl<T: Transport + Unpin> Transport for FreshPorts<T> {
    type Output = T::Output;
    type Error = T::Error;
    type ListenerUpgrade = T::ListenerUpgrade;
    type Dial = T::Dial;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<Self::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<Self::Error>> {
        self.inner.dial(address, DialOpts { port_use: PortUse::New, ..options })
    }

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        Pin::new(&mut self.inner).poll(context)
    }
}
