//! A runtime whose threads all stay on one core, and the processor time that they take.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
use tokio::runtime::{Builder, Runtime};

/// A thread that has ended takes the count of its time with it; so none ends during a benchmark.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(3600);

/// The first two cores that this process may use.
pub(super) fn pair() -> anyhow::Result<[usize; 2]> {
    let set = sched_getaffinity(None).context("cannot ask for this process's cores")?;
    let mut cores = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core));
    match (cores.next(), cores.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => bail!("this benchmark needs two cores, one for each side"),
    }
}

/// One side of a benchmark: a runtime on one core.
pub(super) struct Side {
    runtime: Runtime,
    threads: Arc<Mutex<Vec<i32>>>,
}

impl Side {
    /// A runtime whose threads stay on `core`.
    pub(super) fn on(core: usize) -> anyhow::Result<Self> {
        let threads = Arc::new(Mutex::new(Vec::new()));
        let started = Arc::clone(&threads);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_keep_alive(THREAD_KEEP_ALIVE)
            .enable_all()
            .on_thread_start(move || {
                let mut set = CpuSet::new();
                set.set(core);
                if let Err(error) = sched_setaffinity(None, &set) {
                    tracing::warn!(core, %error, "a thread does not stay on its core");
                }
                started.lock().unwrap_or_else(PoisonError::into_inner).push(gettid().as_raw_nonzero().get());
            })
            .build()
            .context("cannot start a runtime")?;
        Ok(Self { runtime, threads })
    }

    /// Runs `work` on this side's core and waits for it.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        let task = self.runtime.spawn(work);
        self.runtime.block_on(task)?
    }

    /// Starts `work` on this side's core. It ends with the side.
    pub(super) fn spawn(&self, work: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.runtime.spawn(async move {
            if let Err(error) = work.await {
                tracing::warn!(%error, "one side of the benchmark has ended");
            }
        });
    }

    /// Seconds of processor time that this side has taken so far.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let taken = threads.iter().map(|thread| cpu_seconds_at(&format!("/proc/self/task/{thread}/schedstat")));
        taken.sum()
    }
}

/// Seconds of processor time that all threads of this process have taken so far.
pub(super) fn process_cpu_seconds() -> anyhow::Result<f64> {
    let threads = std::fs::read_dir("/proc/self/task").context("cannot list this process's threads")?;
    threads.map(|thread| cpu_seconds_at(&thread?.path().join("schedstat").to_string_lossy())).sum()
}

/// The first field of a `schedstat`: nanoseconds on a core.
fn cpu_seconds_at(path: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let nanos: u64 = text.split(' ').next().unwrap_or_default().parse().with_context(|| format!("{path} is odd"))?;
    Ok(nanos as f64 / 1e9)
}
