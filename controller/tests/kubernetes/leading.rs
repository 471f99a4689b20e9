//! Two replicas and one Lease.

use std::time::Instant;

use hermes_controller::kubernetes::lease::{Election, LeaseConfig, Standing, Timing};
use kube::Client;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::world::{CONTROLLER, DEADLINE, World};

struct Replica {
    standing: watch::Receiver<Standing>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(world: &World, client: Client, identity: &str) -> Self {
        let config = LeaseConfig {
            namespace: CONTROLLER.0.to_owned(),
            name: "hermes-controller".to_owned(),
            identity: identity.to_owned(),
            timing: Timing::default(),
        };
        let (election, standing) = Election::new(client, config);
        let stop = CancellationToken::new();
        let task = world.runtime.spawn(election.run(stop.clone()));
        Self { standing, stop, task }
    }

    fn wait(&mut self, world: &World, wanted: &Standing) {
        let waited = world.runtime.block_on(async {
            timeout(DEADLINE, self.standing.wait_for(|standing| standing == wanted)).await.map(|seen| seen.is_ok())
        });
        assert_eq!(waited, Ok(true), "wanted {wanted:?}, is {:?}", *self.standing.borrow());
    }
}

fn follower_of(leader: &str) -> Standing {
    Standing::Follower { leader: Some(leader.to_owned()) }
}

#[test]
fn leadership_passes_on_when_the_leader_dies_ends_or_is_cut_off() {
    let mut world = World::new().expect("a cluster");
    let client = || world.controller().expect("the controller's client");
    let (first, second) = (client(), client());
    let mut a = Replica::start(&world, first, "a");
    a.wait(&world, &Standing::Leader);
    let mut b = Replica::start(&world, second.clone(), "b");
    b.wait(&world, &follower_of("a"));

    // Dies: nothing is given back.
    a.task.abort();
    let died = Instant::now();
    b.wait(&world, &Standing::Leader);
    println!("hand-over after a crash: {:?}", died.elapsed());

    // Ends: it is given back.
    let mut c = Replica::start(&world, second, "c");
    c.wait(&world, &follower_of("b"));
    b.stop.cancel();
    let ended = Instant::now();
    c.wait(&world, &Standing::Leader);
    println!("hand-over after a clean end: {:?}", ended.elapsed());
    assert!(world.runtime.block_on(b.task).is_ok());
    assert!(matches!(*b.standing.borrow(), Standing::Follower { .. }));

    // Cut off: it stops by itself, and leads again when it can.
    world.cluster.kill_api_server().expect("it ran");
    c.wait(&world, &Standing::Follower { leader: None });
    world.cluster.start_api_server().expect("it comes back");
    c.wait(&world, &Standing::Leader);
    let lease = world.cluster.get(&["-n", CONTROLLER.0, "get", "lease", "hermes-controller", "-o", "json"]);
    let lease: serde_json::Value = serde_json::from_str(&lease.expect("a lease")).expect("JSON");
    assert_eq!(lease["spec"]["holderIdentity"], "c");
    assert_eq!(lease["spec"]["leaseTransitions"], 3);
    c.stop.cancel();
    assert!(world.runtime.block_on(c.task).is_ok());
}
