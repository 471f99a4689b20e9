//! What the transports of libp2p cost against raw TCP, in one run; decided by it: `docs/decisions/0011-transports.md`.
//!
//! ```text
//! cd tools/transports && cargo run --locked --release [ROUNDS]
//! ```
//!
//! Two swarms over loopback, each on a core of its own, with libp2p's own settings. A request is a length of eight bytes; the
//! answer is as many bytes, which nobody looks at. Each transport moves the same bytes as one long answer, as requests of
//! 1 MiB one after the other over one stream (pooled), and as such requests each over a stream of its own (fresh). The best
//! of all rounds counts, because noise only ever adds; the ways take turns within a round.
//!
//! In a crate outside of the workspace, so that the product builds neither quinn nor libp2p's TLS.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, StreamExt as _};
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, noise, tcp, tls, yamux};
use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
use tokio::runtime::{Builder, Runtime};

/// Bytes of one way in one round.
const LEN_BYTES: u64 = 256 << 20;
/// Bytes of one request where there are many.
const REQUEST_LEN_BYTES: u64 = 1 << 20;
/// Bytes that are written at once: a chunk.
const WRITE_LEN_BYTES: usize = 64 * 1024;
/// Rounds, unless said otherwise.
const ROUNDS: u32 = 5;
/// Longer than any run.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// What both sides speak.
const PROTOCOL: StreamProtocol = StreamProtocol::new("/transports/1");

/// A runtime whose threads stay on one core.
struct Side {
    runtime: Runtime,
    threads: Arc<Mutex<Vec<i32>>>,
}

impl Side {
    fn on(core: usize) -> anyhow::Result<Self> {
        let threads = Arc::new(Mutex::new(Vec::new()));
        let started = Arc::clone(&threads);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_keep_alive(IDLE_TIMEOUT)
            .enable_all()
            .on_thread_start(move || {
                let mut set = CpuSet::new();
                set.set(core);
                if let Err(error) = sched_setaffinity(None, &set) {
                    eprintln!("a thread does not stay on core {core}: {error}");
                }
                started.lock().unwrap_or_else(PoisonError::into_inner).push(gettid().as_raw_nonzero().get());
            })
            .build()?;
        Ok(Self { runtime, threads })
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.runtime.block_on(self.runtime.spawn(work))?
    }

    /// Seconds of processor time so far: the first field of `schedstat`, in nanoseconds.
    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut nanos = 0;
        for thread in threads {
            let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"))?;
            nanos += text.split(' ').next().context("an empty schedstat")?.parse::<u64>()?;
        }
        Ok(nanos as f64 / 1e9)
    }
}

/// How bytes are asked for.
#[derive(Debug, Clone, Copy)]
enum Manner {
    Whole,
    Pooled,
    Fresh,
}

impl Manner {
    const ALL: [Self; 3] = [Self::Whole, Self::Pooled, Self::Fresh];

    fn name(self) -> &'static str {
        match self {
            Self::Whole => "one answer of 256 MiB",
            Self::Pooled => "1 MiB requests, pooled stream",
            Self::Fresh => "1 MiB requests, fresh streams",
        }
    }
}

/// The transports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    RawTcp,
    Noise,
    Tls,
    Quic,
}

impl Kind {
    const ALL: [Self; 4] = [Self::RawTcp, Self::Noise, Self::Tls, Self::Quic];

    fn name(self) -> &'static str {
        match self {
            Self::RawTcp => "raw TCP",
            Self::Noise => "TCP, Noise, yamux",
            Self::Tls => "TCP, TLS 1.3, yamux",
            Self::Quic => "QUIC",
        }
    }

    fn swarm(self) -> anyhow::Result<Swarm<libp2p_stream::Behaviour>> {
        let builder = SwarmBuilder::with_new_identity().with_tokio();
        let settings = |config: libp2p::swarm::Config| config.with_idle_connection_timeout(IDLE_TIMEOUT);
        let behaviour = |_: &_| libp2p_stream::Behaviour::new();
        Ok(match self {
            Self::RawTcp => bail!("raw TCP has no swarm"),
            Self::Noise => builder
                .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)?
                .with_behaviour(behaviour)?
                .with_swarm_config(settings)
                .build(),
            Self::Tls => builder
                .with_tcp(tcp::Config::default(), tls::Config::new, yamux::Config::default)?
                .with_behaviour(behaviour)?
                .with_swarm_config(settings)
                .build(),
            Self::Quic => builder.with_quic().with_behaviour(behaviour)?.with_swarm_config(settings).build(),
        })
    }

    fn listen_address(self) -> Multiaddr {
        let text = if self == Self::Quic { "/ip4/127.0.0.1/udp/0/quic-v1" } else { "/ip4/127.0.0.1/tcp/0" };
        text.parse().expect("is an address")
    }
}

/// Where an asker gets its streams from.
#[derive(Clone)]
enum Source {
    Raw(SocketAddr),
    Swarm(libp2p_stream::Control, PeerId),
}

/// A stream of any transport.
trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Both for S {}

impl Source {
    async fn open(&mut self) -> anyhow::Result<Box<dyn Both>> {
        Ok(match self {
            Self::Raw(address) => Box::new(compat(tokio::net::TcpStream::connect(*address).await?)?),
            Self::Swarm(control, peer) => {
                let opened = control.open_stream(*peer, PROTOCOL).await;
                Box::new(opened.map_err(|error| anyhow::anyhow!("cannot open a stream: {error}"))?)
            }
        })
    }
}

/// A socket as libp2p has it, which it makes of tokio's without a cost.
fn compat(stream: tokio::net::TcpStream) -> anyhow::Result<tcp::tokio::TcpStream> {
    stream.set_nodelay(true)?;
    Ok(tcp::tokio::TcpStream(stream))
}

/// Answers requests on `stream` until the other side goes.
async fn answer(mut stream: impl Both) -> std::io::Result<()> {
    let bytes: Vec<u8> = (0..WRITE_LEN_BYTES).map(|at| (at * 31) as u8).collect();
    let mut head = [0; 8];
    while stream.read_exact(&mut head).await.is_ok() {
        let mut left = usize::try_from(u64::from_be_bytes(head)).unwrap_or(usize::MAX);
        while left > 0 {
            let len = left.min(bytes.len());
            stream.write_all(&bytes[..len]).await?;
            left -= len;
        }
        stream.flush().await?;
    }
    Ok(())
}

/// One request and its answer.
async fn ask(stream: &mut dyn Both, len_bytes: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
    stream.write_all(&len_bytes.to_be_bytes()).await?;
    stream.flush().await?;
    let mut left = usize::try_from(len_bytes)?;
    while left > 0 {
        let len = left.min(buffer.len());
        stream.read_exact(&mut buffer[..len]).await?;
        left -= len;
    }
    Ok(())
}

/// Starts a holder of `kind`, and connects an asker with it.
fn connect(kind: Kind, holder: &Side, asker: &Side) -> anyhow::Result<Source> {
    if kind == Kind::RawTcp {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = holder.run(async move { Ok(tokio::net::TcpListener::bind(any).await?) })?;
        let address = listener.local_addr()?;
        holder.runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = compat(stream) else { return };
                tokio::spawn(answer(stream));
            }
        });
        return Ok(Source::Raw(address));
    }
    let (address, peer) = holder.run(async move {
        let mut swarm = kind.swarm()?;
        let mut incoming = swarm.behaviour().new_control().accept(PROTOCOL).context("the protocol is taken")?;
        swarm.listen_on(kind.listen_address())?;
        let address = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        let peer = *swarm.local_peer_id();
        tokio::spawn(async move { while swarm.next().await.is_some() {} });
        tokio::spawn(async move {
            while let Some((_, stream)) = incoming.next().await {
                tokio::spawn(answer(stream));
            }
        });
        Ok((address, peer))
    })?;
    asker.run(async move {
        let mut swarm = kind.swarm()?;
        swarm.dial(address)?;
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => break,
                SwarmEvent::OutgoingConnectionError { error, .. } => bail!("cannot connect: {error}"),
                _ => {}
            }
        }
        let control = swarm.behaviour().new_control();
        tokio::spawn(async move { while swarm.next().await.is_some() {} });
        Ok(Source::Swarm(control, peer))
    })
}

/// Moves the bytes once.
async fn transfer(mut source: Source, manner: Manner) -> anyhow::Result<()> {
    let mut buffer = vec![0; WRITE_LEN_BYTES];
    let len_bytes = if matches!(manner, Manner::Whole) { LEN_BYTES } else { REQUEST_LEN_BYTES };
    let mut stream = source.open().await?;
    for no in 0..LEN_BYTES / len_bytes {
        if matches!(manner, Manner::Fresh) && no > 0 {
            stream = source.open().await?;
        }
        ask(&mut *stream, len_bytes, &mut buffer).await?;
    }
    Ok(())
}

/// The best of what was seen: seconds, and processor seconds of the holder and of the asker.
#[derive(Debug, Clone, Copy)]
struct Best([f64; 3]);

fn main() -> anyhow::Result<()> {
    let rounds = std::env::args().nth(1).map_or(Ok(ROUNDS), |text| text.parse()).context("ROUNDS is no number")?;
    let cores = sched_getaffinity(None)?;
    let mut cores = (0..CpuSet::MAX_CPU).filter(|core| cores.is_set(*core));
    let (Some(first), Some(second)) = (cores.next(), cores.next()) else { bail!("two cores are needed") };
    let (holder, asker) = (Side::on(first)?, Side::on(second)?);
    let sources = Kind::ALL.map(|kind| connect(kind, &holder, &asker));
    let mut best = [[Best([f64::MAX; 3]); Manner::ALL.len()]; Kind::ALL.len()];
    // The first round warms windows and is not counted.
    for round in 0..=rounds {
        for (source, best) in sources.iter().zip(&mut best) {
            let source = source.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            for (manner, best) in Manner::ALL.into_iter().zip(best) {
                let before = (holder.cpu_seconds()?, asker.cpu_seconds()?);
                let started = Instant::now();
                asker.run(transfer(source.clone(), manner))?;
                let seconds = started.elapsed().as_secs_f64();
                if round > 0 {
                    let seen = [seconds, holder.cpu_seconds()? - before.0, asker.cpu_seconds()? - before.1];
                    best.0.iter_mut().zip(seen).for_each(|(best, seen)| *best = best.min(seen));
                }
            }
        }
    }
    print(&best);
    Ok(())
}

fn print(best: &[[Best; Manner::ALL.len()]; Kind::ALL.len()]) {
    println!("| transport | manner | MB/s | of raw TCP | CPU s/GB, sender + receiver |");
    println!("|---|---|---|---|---|");
    let gigabytes = LEN_BYTES as f64 / 1e9;
    for (kind, ways) in Kind::ALL.into_iter().zip(best) {
        for (at, Best([seconds, holder, asker])) in ways.iter().enumerate() {
            let raw = best[0][at].0[0];
            println!(
                "| {} | {} | {:.0} | {:.2} | {:.2} + {:.2} |",
                kind.name(),
                Manner::ALL[at].name(),
                gigabytes * 1e3 / seconds,
                raw / seconds,
                holder / gigabytes,
                asker / gigabytes
            );
        }
    }
}
