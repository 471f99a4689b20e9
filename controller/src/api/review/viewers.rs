//! Who may see the status page, asked of the API server: whose token it is, and whether that user may `get /status`.
//!
//! Both questions together are what kubectl's own requests go through, so that rights are given as everywhere, by RBAC: a
//! ClusterRole with the nonResourceURL `/status` (`hermes-viewer` in `deploy/rbac.yaml`). A token is one for the API
//! server itself, such as `kubectl create token` makes.

use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};

use super::super::numbers::Refusal;
use super::kubernetes::unavailable;
use super::{ReviewError, Viewers};
use crate::page::PATH;

/// Asks the API server.
#[derive(Clone)]
pub struct AccessReviews {
    client: Client,
}

impl std::fmt::Debug for AccessReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessReviews").finish_non_exhaustive()
    }
}

impl AccessReviews {
    /// Asks by `client`, which may create TokenReviews and SubjectAccessReviews.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    async fn ask(&self, token: &str) -> Result<(), ReviewError> {
        // Without audiences: the token has to be for the API server.
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviewed = Api::all(self.client.clone()).create(&PostParams::default(), &review).await;
        let status = reviewed.map_err(|error| unavailable(&error))?.status.unwrap_or_default();
        let user = match (status.authenticated, status.user) {
            (Some(true), Some(user)) => user,
            _ => {
                let message = "the API server does not know the token; make one with kubectl create token";
                return Err(ReviewError::refused(Refusal::UnknownToken, message));
            }
        };
        let name = user.username.clone().unwrap_or_default();
        if self.may_look(user).await? {
            return Ok(());
        }
        let message = format!("{name} may not get {PATH}; bind the ClusterRole hermes-viewer to it");
        Err(ReviewError::refused(Refusal::NotAllowed, message))
    }

    async fn may_look(&self, user: UserInfo) -> Result<bool, ReviewError> {
        let what = NonResourceAttributes { path: Some(PATH.to_owned()), verb: Some("get".to_owned()) };
        let spec = SubjectAccessReviewSpec {
            user: user.username,
            uid: user.uid,
            groups: user.groups,
            extra: user.extra,
            non_resource_attributes: Some(what),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let reviewed = Api::all(self.client.clone()).create(&PostParams::default(), &review).await;
        let status = reviewed.map_err(|error| unavailable(&error))?.status.unwrap_or_default();
        Ok(status.allowed && status.denied != Some(true))
    }
}

impl Viewers for AccessReviews {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        Box::pin(self.ask(token))
    }
}
