//! Who wants what: policies, workloads, and the texts between them.

use std::collections::{BTreeMap, BTreeSet};

use super::reference::{TEXT_LEN_MAX_BYTES, normalise};
use super::selectors::Selectors;
use super::{Core, Turn};
use crate::crd::HermesPolicySpec;
use crate::event::{Name, Policy, SecretRef, Subject, Workload, WorkloadId, WorkloadKind};

/// Platforms of one policy.
const PLATFORMS_MAX: usize = 16;
/// Secrets that are tried for one name.
const SECRETS_MAX: usize = 32;

/// A policy, and what was made of it.
#[derive(Debug)]
pub(super) struct PolicyState {
    pub(super) generation: i64,
    pub(super) spec: HermesPolicySpec,
    pub(super) selectors: Selectors,
    pub(super) platforms: BTreeSet<String>,
    pub(super) secrets: Vec<SecretRef>,
    /// Entries of the spec, other than selectors, that mean nothing.
    pub(super) problems: Vec<String>,
}

/// An image's name as somebody wrote it.
#[derive(Debug, Default)]
pub(super) struct Text {
    pub(super) workloads: BTreeSet<WorkloadId>,
    pub(super) policies: BTreeSet<String>,
    /// What it means; none when it names no image of a registry.
    reference: Option<String>,
    /// How many of the workloads wait. Counted, because thousands of pods may write one text.
    waiting: u32,
    /// The secrets of the workloads, and how many of them name each.
    secrets: BTreeMap<SecretRef, u32>,
}

impl Text {
    fn count(&mut self, workload: &Workload) {
        self.workloads.insert(workload.id.clone());
        self.waiting += u32::from(workload.waiting);
        for secret in &workload.pull_secrets {
            *self.secrets.entry(secret.clone()).or_default() += 1;
        }
    }

    fn uncount(&mut self, workload: &Workload) {
        self.workloads.remove(&workload.id);
        self.waiting -= u32::from(workload.waiting);
        for secret in &workload.pull_secrets {
            if let Some(count) = self.secrets.get_mut(secret) {
                *count -= 1;
                if *count == 0 {
                    self.secrets.remove(secret);
                }
            }
        }
    }
}

/// What is wanted of one platform of a reference.
#[derive(Debug, Default)]
pub(super) struct Wish {
    pub(super) policies: BTreeSet<String>,
    /// Whether a policy that is not paused wants it.
    pub(super) active: bool,
}

impl PolicyState {
    fn new(policy: Policy, defaults: &[String]) -> Self {
        let Policy { generation, spec, .. } = policy;
        let mut problems = Vec::new();
        let mut platforms = BTreeSet::new();
        for text in &spec.platforms {
            match hermes_origin::wanted_platform(Some(text.trim())) {
                Ok(platform) if platforms.len() < PLATFORMS_MAX => {
                    platforms.insert(platform.to_string());
                }
                Ok(_) => problems.push(format!("there are more than {PLATFORMS_MAX} platforms")),
                Err(error) => problems.push(error.to_string()),
            }
        }
        if spec.platforms.is_empty() {
            platforms.extend(defaults.iter().cloned());
        }
        let mut secrets = Vec::new();
        for text in spec.image_pull_secrets.iter().take(SECRETS_MAX) {
            match text.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                    secrets.push(SecretRef { namespace: namespace.to_owned(), name: name.to_owned() });
                }
                _ => problems.push(format!("imagePullSecrets: '{}' is not namespace/name", text.escape_debug())),
            }
        }
        let selectors = Selectors::compile(&spec.image_selectors);
        Self { generation, spec, selectors, platforms, secrets, problems }
    }
}

impl Core {
    pub(super) fn policy_changed(&mut self, policy: Policy) {
        let name = policy.name.clone();
        let state = PolicyState::new(policy, &self.settings.platforms);
        for (text, known) in &mut self.texts {
            let Some(reference) = &known.reference else { continue };
            let was = known.policies.contains(&name);
            let is = state.selectors.match_text(text);
            if is {
                known.policies.insert(name.clone());
            } else {
                known.policies.remove(&name);
            }
            // Platforms, logins and the pause count for those that stay, too.
            if was || is {
                self.changed_references.insert(reference.clone());
            }
        }
        self.nodes.want_plan();
        self.policies.insert(name.clone(), state);
        self.changed_policies.insert(name);
    }

    pub(super) fn policy_gone(&mut self, name: &str) {
        if self.policies.remove(name).is_none() {
            return;
        }
        for known in self.texts.values_mut() {
            if known.policies.remove(name)
                && let Some(reference) = &known.reference
            {
                self.changed_references.insert(reference.clone());
            }
        }
        for (key, image) in &mut self.images {
            let mut held = false;
            image.holders.retain(|_, policies| {
                held |= policies.remove(name);
                !policies.is_empty()
            });
            if held {
                self.changed_images.insert(key.clone());
            }
        }
        self.nodes.want_plan();
        self.statuses.remove(name);
        self.changed_policies.remove(name);
    }

    pub(super) fn workload_changed(&mut self, workload: Workload) {
        let before = self.workloads.insert(workload.id.clone(), workload.clone());
        let Some(before) = before else {
            workload.images.iter().for_each(|text| self.text_written(text, &workload));
            return;
        };
        for text in before.images.difference(&workload.images) {
            self.text_left(text, &before);
        }
        for text in workload.images.difference(&before.images) {
            self.text_written(text, &workload);
        }
        if before.pull_secrets == workload.pull_secrets && before.waiting == workload.waiting {
            return;
        }
        for text in workload.images.intersection(&before.images) {
            let Some(known) = self.texts.get_mut(text) else { continue };
            known.uncount(&before);
            known.count(&workload);
            self.changed_references.extend(known.reference.clone());
        }
    }

    pub(super) fn workload_gone(&mut self, id: &WorkloadId) {
        let Some(workload) = self.workloads.remove(id) else { return };
        for text in &workload.images {
            self.text_left(text, &workload);
        }
        for key in self.held.remove(id).unwrap_or_default() {
            if let Some(image) = self.images.get_mut(&key) {
                image.holders.remove(id);
                self.changed_images.insert(key);
            }
        }
    }

    fn text_written(&mut self, text: &str, workload: &Workload) {
        if text.len() > TEXT_LEN_MAX_BYTES {
            return;
        }
        let policies = &self.policies;
        let known = self.texts.entry(text.to_owned()).or_insert_with(|| {
            let matching = policies.iter().filter(|(_, policy)| policy.selectors.match_text(text));
            Text {
                policies: matching.map(|(name, _)| name.clone()).collect(),
                reference: normalise(text),
                ..Text::default()
            }
        });
        known.count(workload);
        if let Some(reference) = known.reference.clone() {
            self.references.entry(reference.clone()).or_default().insert(text.to_owned());
            self.changed_references.insert(reference);
        }
    }

    fn text_left(&mut self, text: &str, workload: &Workload) {
        let Some(known) = self.texts.get_mut(text) else { return };
        known.uncount(workload);
        let (reference, unused) = (known.reference.clone(), known.workloads.is_empty());
        if unused {
            self.texts.remove(text);
        }
        let Some(reference) = reference else { return };
        if unused && let Some(texts) = self.references.get_mut(&reference) {
            texts.remove(text);
            if texts.is_empty() {
                self.references.remove(&reference);
            }
        }
        self.changed_references.insert(reference);
    }

    fn texts_of<'a>(&'a self, reference: &str) -> impl Iterator<Item = &'a Text> {
        self.references.get(reference).into_iter().flatten().filter_map(|text| self.texts.get(text))
    }

    /// The workloads that a policy's match makes count for `reference`.
    pub(super) fn workloads_of<'a>(&'a self, reference: &str) -> impl Iterator<Item = &'a Workload> {
        self.matched_texts(reference).flat_map(|text| &text.workloads).filter_map(|id| self.workloads.get(id))
    }

    fn matched_texts<'a>(&'a self, reference: &str) -> impl Iterator<Item = &'a Text> {
        self.texts_of(reference).filter(|text| !text.policies.is_empty())
    }

    /// What is wanted of `reference`, by platform.
    fn wishes(&self, reference: &str) -> BTreeMap<String, Wish> {
        let mut wishes: BTreeMap<String, Wish> = BTreeMap::new();
        for name in self.texts_of(reference).flat_map(|text| &text.policies) {
            let Some(policy) = self.policies.get(name) else { continue };
            for platform in &policy.platforms {
                let wish = wishes.entry(platform.clone()).or_default();
                wish.policies.insert(name.clone());
                wish.active |= !policy.spec.paused;
            }
        }
        wishes
    }

    /// Where logins for `reference` are: those of its workloads, then those of the policies.
    fn secrets(&self, reference: &str) -> Vec<SecretRef> {
        let mut seen = BTreeSet::new();
        let policies = self.texts_of(reference).flat_map(|text| &text.policies);
        let of_policies = policies.filter_map(|name| self.policies.get(name)).flat_map(|policy| &policy.secrets);
        let of_workloads = self.matched_texts(reference).flat_map(|text| text.secrets.keys());
        let all = of_workloads.chain(of_policies).filter(|secret| seen.insert((*secret).clone()));
        all.take(SECRETS_MAX).cloned().collect()
    }

    /// Draws the consequences for the names of `reference`.
    pub(super) fn settle_reference(&mut self, turn: &mut Turn<'_>, reference: &str) {
        let mut wishes = self.wishes(reference);
        let secrets = self.secrets(reference);
        let waiting = self.matched_texts(reference).map(|text| text.waiting).sum();
        let known: Vec<_> = self.names_of(reference).collect();
        for name in known {
            match wishes.remove(&name.platform) {
                Some(wish) => self.name_wanted(turn, &name, wish, &secrets, waiting),
                None => self.name_unwanted(&name),
            }
        }
        self.forget_left_out(reference);
        for (platform, wish) in wishes {
            let name = Name { reference: reference.to_owned(), platform };
            if self.names.len() >= self.settings.names_max {
                self.changed_policies.extend(wish.policies.iter().cloned());
                self.left_out.insert(name, wish.policies);
                continue;
            }
            self.name_found(turn, &name, &wish);
            self.name_wanted(turn, &name, wish, &secrets, waiting);
        }
    }

    /// What of `reference` is not followed because there are too many names is looked at anew.
    fn forget_left_out(&mut self, reference: &str) {
        let first = Name { reference: reference.to_owned(), platform: String::new() };
        let names = self.left_out.range(first..).map(|(name, _)| name);
        let names: Vec<Name> = names.take_while(|name| name.reference == reference).cloned().collect();
        for name in names {
            self.changed_policies.extend(self.left_out.remove(&name).unwrap_or_default());
        }
    }

    /// Tells that an image is taken care of from now on.
    fn name_found(&self, turn: &mut Turn<'_>, name: &Name, wish: &Wish) {
        if self.kept.contains_key(name) {
            return;
        }
        let workload = self.workloads_of(&name.reference).next();
        let who = workload.map_or_else(String::new, |workload| format!(", named by {}", workload.id));
        for policy in &wish.policies {
            let paused = self.policies.get(policy).is_some_and(|policy| policy.spec.paused);
            let pause = if paused { "; the policy is paused" } else { "" };
            turn.tell(Subject::Policy(policy.clone()), false, "Matched", format!("{name} matches{who}{pause}"));
        }
    }

    /// The pods that may run what `reference` has stood for.
    pub(super) fn running_pods(&self, reference: &str) -> Vec<(WorkloadId, BTreeSet<String>)> {
        let pods = self.matched_texts(reference).flat_map(|text| text.workloads.iter().map(|id| (id, &text.policies)));
        let running = pods.filter(|(id, _)| {
            id.kind == WorkloadKind::Pod && self.workloads.get(*id).is_some_and(|workload| !workload.waiting)
        });
        running.map(|(id, policies)| (id.clone(), policies.clone())).collect()
    }
}
