//! Who may join as which node, and who may see the status page, by the word of a real API server.

use hermes_controller::api::numbers::Refusal;
use hermes_controller::api::review::kubernetes::TokenReviews;
use hermes_controller::api::review::viewers::AccessReviews;
use hermes_controller::api::review::{ReviewError, Reviewer as _, Viewers as _};
use hermes_controller_api::TOKEN_AUDIENCE;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;

use crate::world::World;

/// Two nodes, and a pod of the nodes' account on the first.
const CLUSTER: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node-1}
---
apiVersion: v1
kind: Node
metadata: {name: node-2}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: hermes-node, namespace: hermes-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: other, namespace: hermes-system}
---
apiVersion: v1
kind: Pod
metadata: {name: daemon, namespace: hermes-system}
spec:
  serviceAccountName: hermes-node
  automountServiceAccountToken: false
  nodeName: node-1
  containers: [{name: daemon, image: daemon}]
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: hermes-system}
spec:
  serviceAccountName: other
  automountServiceAccountToken: false
  nodeName: node-1
  containers: [{name: other, image: other}]
"#;

/// A token of `account` for `audience`, or for the API server when that is empty, bound to `pod`.
fn token(world: &World, account: &str, audience: &str, pod: Option<&str>) -> String {
    let bound = pod.map(|name| BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(name.to_owned()),
        uid: None,
    });
    let spec = TokenRequestSpec {
        audiences: Some(audience).filter(|it| !it.is_empty()).map(str::to_owned).into_iter().collect(),
        bound_object_ref: bound,
        expiration_seconds: Some(600),
    };
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let accounts = Api::<ServiceAccount>::namespaced(world.admin().expect("a client"), "hermes-system");
    let parameters = PostParams::default();
    let made = accounts.create_token_request(account, &parameters, &request);
    world.runtime.block_on(made).expect("a token").status.expect("a status").token
}

#[test]
fn a_token_is_good_for_the_node_of_its_pod_alone() {
    let world = World::new().expect("a cluster");
    world.cluster.apply(CLUSTER).expect("applied");
    let accounts = [("hermes-system".to_owned(), "hermes-node".to_owned())];
    let reviews = TokenReviews::new(world.controller().expect("the controller's client"), accounts);
    let review = |token: &str, node: &str| world.runtime.block_on(reviews.review(token, node));
    let refused = |token: &str, node: &str| match review(token, node) {
        Err(ReviewError::Refused { why, .. }) => why,
        other => panic!("{other:?}"),
    };

    let good = token(&world, "hermes-node", TOKEN_AUDIENCE, Some("daemon"));
    review(&good, "node-1").expect("its own node");
    assert_eq!(refused(&good, "node-2"), Refusal::OtherNode);
    let of_other_audience = token(&world, "hermes-node", "vault", Some("daemon"));
    assert_eq!(refused(&of_other_audience, "node-1"), Refusal::OtherAudience);
    let unbound = token(&world, "hermes-node", TOKEN_AUDIENCE, None);
    assert_eq!(refused(&unbound, "node-1"), Refusal::OtherNode);
    let of_other_account = token(&world, "other", TOKEN_AUDIENCE, Some("other"));
    assert_eq!(refused(&of_other_account, "node-1"), Refusal::OtherAccount);
    assert_eq!(refused("no token", "node-1"), Refusal::UnknownToken);

    // A pod that is gone proves nothing any more.
    world
        .cluster
        .get(&["delete", "pod", "daemon", "-n", "hermes-system", "--force", "--grace-period=0"])
        .expect("deleted");
    refused(&good, "node-1");
}

/// Somebody who has the ClusterRole of the page, and somebody who has not.
const VIEWERS: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: looks, namespace: hermes-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: other, namespace: hermes-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: looks}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: hermes-viewer}
subjects: [{kind: ServiceAccount, name: looks, namespace: hermes-system}]
"#;

#[test]
fn the_page_is_for_who_may_get_its_path() {
    let world = World::new().expect("a cluster");
    world.cluster.apply(VIEWERS).expect("applied");
    let reviews = AccessReviews::new(world.controller().expect("the controller's client"));
    let review = |token: &str| match world.runtime.block_on(reviews.review(token)) {
        Ok(()) => None,
        Err(ReviewError::Refused { why, .. }) => Some(why),
        Err(error) => panic!("{error}"),
    };
    let good = token(&world, "looks", "", None);
    assert_eq!(review(&good), None, "as kubectl create token makes it");
    assert_eq!(review(&token(&world, "other", "", None)), Some(Refusal::NotAllowed));
    // What nodes join with is no key to the page.
    let of_node = token(&world, "looks", TOKEN_AUDIENCE, None);
    assert_eq!(review(&of_node), Some(Refusal::UnknownToken));
    assert_eq!(review("no token"), Some(Refusal::UnknownToken));
    // Rights that are taken back are gone.
    world.cluster.get(&["delete", "clusterrolebinding", "looks"]).expect("deleted");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while review(&good).is_none() {
        assert!(std::time::Instant::now() < end, "the right stays");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
