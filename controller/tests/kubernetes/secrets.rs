//! Logins are read by name, and nothing else of secrets is to be had.

use hermes_controller::event::{FailureClass, SecretRef};
use hermes_controller::kubernetes::secrets::{SecretError, Secrets};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::ListParams;

use crate::world::World;

const SECRETS: &str = r#"
{apiVersion: v1, kind: Secret, metadata: {name: login, namespace: default}, type: kubernetes.io/dockerconfigjson,
 stringData: {.dockerconfigjson: '{"auths":{"r.example":{"auth":"dTpw"}}}'}}
---
{apiVersion: v1, kind: Secret, metadata: {name: old, namespace: default}, type: kubernetes.io/dockercfg,
 stringData: {.dockercfg: '{"r.example":{"auth":"dTpw"}}'}}
---
{apiVersion: v1, kind: Secret, metadata: {name: other, namespace: default}, stringData: {password: hush}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: nobody, namespace: default}}
"#;

#[test]
fn a_login_is_read_by_name_and_nothing_else_is_to_be_had() {
    let world = World::new().expect("a cluster");
    world.cluster.apply(SECRETS).expect("secrets");
    let client = world.controller().expect("the controller's client");
    let secrets = Secrets::new(client.clone());
    let read = |secrets: &Secrets, name: &str| {
        let secret = SecretRef { namespace: "default".to_owned(), name: name.to_owned() };
        world.runtime.block_on(secrets.logins(&secret))
    };
    for name in ["login", "old"] {
        assert_eq!(read(&secrets, name).expect("a login").as_slice(), br#"{"auths":{"r.example":{"auth":"dTpw"}}}"#);
    }
    let failed = |secrets: &Secrets, name: &str| read(secrets, name).expect_err("no login");
    assert!(matches!(failed(&secrets, "other"), SecretError::NoLogins { .. }));
    let missing = failed(&secrets, "missing");
    assert_eq!((missing.reason(), missing.class()), ("PullSecretNotFound", FailureClass::Denied));
    let nobody = world.cluster.service_account("default", "nobody").expect("a token");
    let forbidden = failed(&Secrets::new(world.client(&nobody).expect("a client")), "login");
    assert!(matches!(forbidden, SecretError::Forbidden { .. }), "{forbidden}");
    // The controller cannot look around.
    let all = Api::<Secret>::all(client.clone());
    let listed = world.runtime.block_on(all.list(&ListParams::default()));
    assert!(matches!(listed, Err(kube::Error::Api(status)) if status.code == 403));

    let mut world = world;
    world.cluster.kill_api_server().expect("it ran");
    let secret = SecretRef { namespace: "default".to_owned(), name: "login".to_owned() };
    let away = world.runtime.block_on(secrets.logins(&secret)).expect_err("nobody answers");
    assert_eq!((away.reason(), away.class()), ("PullSecretUnreachable", FailureClass::Transient));
    assert!(!format!("{away:?}").contains("dTpw"));
}
