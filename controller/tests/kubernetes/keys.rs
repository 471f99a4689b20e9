//! The controller's keys, in a Secret that both replicas have.

use std::sync::Arc;

use hermes_controller::kubernetes::vault::{ROOTS_NAME, SecretVault};
use hermes_controller::run::Vault as _;
use hermes_p2p::unix_now;

use crate::world::{CONTROLLER, World};

#[test]
fn replicas_have_the_same_keys_and_none_undoes_what_another_has_written() {
    let world = World::new().expect("a cluster");
    let vault = || SecretVault::new(world.controller().expect("the controller's client"), CONTROLLER.0);
    let (first, second) = (vault(), vault());
    world.runtime.block_on(async {
        let cluster = "prod".parse().expect("a name");
        let keys = first.keys().await.expect("made");
        assert_eq!(second.keys().await.expect("read").public_keys(), keys.public_keys());
        let authority = first.authority(&cluster).await.expect("made");
        assert_eq!(second.authority(&cluster).await.expect("read").roots(), authority.roots());

        let newer = Arc::new(authority.renewed(unix_now()).expect("renewed"));
        first.keep(Arc::clone(&newer)).await.expect("kept");
        let other = Arc::new(authority.renewed(unix_now()).expect("renewed"));
        let refused = second.keep(other).await.expect_err("it knows an older one").to_string();
        assert!(refused.contains("another replica"), "{refused}");
        assert_eq!(second.authority(&cluster).await.expect("read").roots(), newer.roots());

        // Who rotates the signing keys by hand changes the Secret, but not the authority.
        let (secret, patch) = ("hermes-controller-keys", r#"{"metadata":{"labels":{"rotated":"by-hand"}}}"#);
        world.cluster.get(&["patch", "secret", secret, "-n", CONTROLLER.0, "-p", patch]).expect("patched");
        first.keep(Arc::new(newer.renewed(unix_now()).expect("renewed"))).await.expect("kept");
    });
}

#[test]
fn roots_are_shown_in_a_config_map_that_is_there_and_no_other_is_made() {
    let world = World::new().expect("a cluster");
    let client = world.controller().expect("the controller's client");
    let vault = SecretVault::new(client, CONTROLLER.0);
    for roots in ["first", "second"] {
        world.runtime.block_on(vault.show_roots(roots)).expect("shown");
        let path = "jsonpath={.data.api-roots\\.pem}";
        let there = world.cluster.get(&["get", "configmap", ROOTS_NAME, "-n", CONTROLLER.0, "-o", path]);
        assert_eq!(there.expect("there"), roots);
    }
    world.cluster.get(&["delete", "configmap", ROOTS_NAME, "-n", CONTROLLER.0]).expect("deleted");
    let refused = world.runtime.block_on(vault.show_roots("third")).expect_err("there is none to be written");
    assert!(refused.to_string().contains("make it"), "{refused}");
}
