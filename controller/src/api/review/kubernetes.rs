//! ServiceAccount tokens, reviewed by the API server.
//!
//! A node's pod has a projected token for the audience `hermes-controller`, which the kubelet renews. The API server says
//! whether it is good, and whose: the ServiceAccount, the pod, and on servers since 1.30 the pod's node. On older ones
//! the pod is looked up and says its node itself. That node, and no other, may the pod speak for.

use std::collections::BTreeMap;

use base64::Engine as _;
use futures::future::BoxFuture;
use hermes_controller_api::TOKEN_AUDIENCE;
use hermes_p2p::unix_now;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Deserialize;

use super::super::numbers::Refusal;
use super::{ReviewError, Reviewer};

/// What the API server says of a token's pod (`k8s.io/apiserver/pkg/authentication/serviceaccount`).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// What it says of the pod's node since 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// What a ServiceAccount's user name begins with.
const ACCOUNT: &str = "system:serviceaccount:";

/// Asks the API server.
#[derive(Clone)]
pub struct TokenReviews {
    client: Client,
    /// `NAMESPACE:NAME` of the accounts that nodes have.
    accounts: Vec<String>,
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenReviews").field("accounts", &self.accounts).finish_non_exhaustive()
    }
}

impl TokenReviews {
    /// Asks by `client`, which may create TokenReviews and get pods, and believes pods of these accounts (namespace, name).
    pub fn new(client: Client, accounts: impl IntoIterator<Item = (String, String)>) -> Self {
        let accounts = accounts.into_iter().map(|(namespace, name)| format!("{namespace}:{name}")).collect();
        Self { client, accounts }
    }

    async fn ask(&self, token: &str, node: &str) -> Result<(), ReviewError> {
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviewed = Api::all(self.client.clone()).create(&PostParams::default(), &review).await;
        let status = reviewed.map_err(|error| unavailable(&error))?.status.unwrap_or_default();
        let audiences = status.audiences.unwrap_or_default();
        if !status.authenticated.unwrap_or(false) || !audiences.iter().any(|audience| audience == TOKEN_AUDIENCE) {
            let (why, message) = why_not(token);
            return Err(ReviewError::refused(why, message));
        }
        let user = status.user.unwrap_or_default();
        let account = user.username.as_deref().and_then(|name| name.strip_prefix(ACCOUNT)).unwrap_or_default();
        let Some((namespace, _)) =
            account.split_once(':').filter(|_| self.accounts.iter().any(|known| known == account))
        else {
            let message = "the token is of a ServiceAccount that is not the nodes'; give the pod that of the DaemonSet";
            return Err(ReviewError::refused(Refusal::OtherAccount, message));
        };
        let found = match extra(&user, NODE_NAME) {
            Some(name) => Some(name.to_owned()),
            None => self.node_of_pod(namespace, &user).await?,
        };
        match found {
            Some(found) if found == node => Ok(()),
            Some(found) => {
                let message = format!("the token is of a pod on node {found}; give --node-name the name of that node");
                Err(ReviewError::refused(Refusal::OtherNode, message))
            }
            None => Err(ReviewError::refused(
                Refusal::OtherNode,
                "the token is bound to no pod on a node; mount a projected ServiceAccount token",
            )),
        }
    }

    /// The node of the pod that the token is bound to. A pod of the same name that came later is another one.
    async fn node_of_pod(&self, namespace: &str, user: &UserInfo) -> Result<Option<String>, ReviewError> {
        let (Some(name), Some(uid)) = (extra(user, POD_NAME), extra(user, POD_UID)) else { return Ok(None) };
        let pod = Api::<Pod>::namespaced(self.client.clone(), namespace).get_opt(name).await;
        let pod = pod.map_err(|error| unavailable(&error))?;
        let pod = pod.filter(|pod| pod.metadata.uid.as_deref() == Some(uid));
        Ok(pod.and_then(|pod| pod.spec?.node_name))
    }
}

pub(super) fn unavailable(error: &kube::Error) -> ReviewError {
    ReviewError::Unavailable { reason: format!("the API server: {error}") }
}

fn extra<'a>(user: &'a UserInfo, key: &str) -> Option<&'a str> {
    let all: Option<&BTreeMap<String, Vec<String>>> = user.extra.as_ref();
    match all?.get(key)?.as_slice() {
        [only] => Some(only),
        _ => None,
    }
}

/// What a token says about itself. Nothing of it is believed: it tells which reason is likely, for people.
#[derive(Debug, Deserialize, Default)]
struct Claims {
    #[serde(default)]
    aud: Audiences,
    #[serde(default)]
    exp: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Audiences {
    fn has(&self, audience: &str) -> bool {
        match self {
            Self::One(one) => one == audience,
            Self::Many(many) => many.iter().any(|one| one == audience),
        }
    }
}

/// Why the API server has refused a token, as far as the token tells.
fn why_not(token: &str) -> (Refusal, &'static str) {
    let unknown =
        (Refusal::UnknownToken, "the API server does not know the token; give a projected ServiceAccount token");
    let Some(payload) = token.split('.').nth(1) else { return unknown };
    let Ok(bytes) = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload) else { return unknown };
    let Ok(claims) = serde_json::from_slice::<Claims>(&bytes) else { return unknown };
    if claims.exp.is_some_and(|end| end <= unix_now()) {
        return (Refusal::Expired, "the token has ended; read it again from its file, which the kubelet renews");
    }
    if !claims.aud.has(TOKEN_AUDIENCE) {
        return (Refusal::OtherAudience, "the token is for another audience; project one for 'hermes-controller'");
    }
    unknown
}

impl Reviewer for TokenReviews {
    fn review<'a>(&'a self, token: &'a str, node: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        Box::pin(self.ask(token, node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_token_tells_why_as_far_as_it_can() {
        let token = |claims: &str| {
            let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims);
            why_not(&format!("head.{payload}.signature")).0
        };
        assert_eq!(token(r#"{"aud":["other"],"exp":9999999999}"#), Refusal::OtherAudience);
        assert_eq!(token(r#"{"aud":"hermes-controller","exp":1}"#), Refusal::Expired);
        assert_eq!(token(r#"{"aud":"hermes-controller","exp":9999999999}"#), Refusal::UnknownToken);
        assert_eq!(token("no json"), Refusal::UnknownToken);
        assert_eq!(why_not("").0, Refusal::UnknownToken);
    }
}
