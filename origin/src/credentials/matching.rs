//! Which images a pattern of the kubelet's means (Kubernetes documentation, "Configure image matching").
//!
//! A pattern is a host with an optional port and path. `*`, `?` and `[...]` work inside one label of the host; both
//! sides have equally many labels; the port must be the same, and absent where it is absent; the path is a prefix.

/// Docker Hub's names: references say the first, stored logins say any.
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// The names under which logins for `registry` may be stored.
pub(super) fn aliases(registry: &str) -> Vec<&str> {
    let mut names = vec![registry];
    if DOCKER_HUB_NAMES.contains(&registry) {
        names.extend(DOCKER_HUB_NAMES.iter().filter(|name| **name != registry));
    }
    names
}

/// Whether `pattern` means the image `registry/repository`.
pub(super) fn matches(pattern: &str, registry: &str, repository: &str) -> bool {
    let (pattern_host, pattern_path) = split_path(without_scheme(pattern));
    let (pattern_name, pattern_port) = split_port(pattern_host);
    let (name, port) = split_port(registry);
    if pattern_port != port || !format!("/{repository}").starts_with(pattern_path) {
        return false;
    }
    let (mut patterns, mut labels) = (pattern_name.split('.'), name.split('.'));
    loop {
        match (patterns.next(), labels.next()) {
            (None, None) => return true,
            (Some(pattern), Some(label)) if glob(pattern.as_bytes(), label.as_bytes()) => {}
            _ => return false,
        }
    }
}

/// Whether a pattern can be used at all: it names a host.
pub(super) fn is_pattern(pattern: &str) -> bool {
    let (host, _) = split_path(without_scheme(pattern));
    !host.is_empty() && !host.chars().any(|c| c.is_whitespace() || c.is_control())
}

/// A key of a stored login as a pattern: `https://index.docker.io/v1/` is `index.docker.io`.
pub(super) fn key(text: &str) -> String {
    let (host, path) = split_path(without_scheme(text));
    let path = if path.starts_with("/v1/") || path.starts_with("/v2/") { &path[3..] } else { path };
    let path = if matches!(path, "/v1" | "/v2") { "" } else { path };
    format!("{host}{}", path.trim_end_matches('/'))
}

fn without_scheme(text: &str) -> &str {
    text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text)
}

/// Host, and path with its slash.
fn split_path(text: &str) -> (&str, &str) {
    text.find('/').map_or((text, ""), |at| text.split_at(at))
}

fn split_port(host: &str) -> (&str, &str) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => (name, port),
        _ => (host, ""),
    }
}

/// Shell patterns without a separator: `*`, `?`, `[a-c]`, `[^a]`, and `\` before what is meant as it stands. Linear in
/// the product of both lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut from) = (0, 0);
    // Where to go on when what follows the last star did not match: one byte further.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if at < pattern.len() && pattern[at] == b'*' {
            star = Some((at, from));
            at += 1;
            continue;
        }
        if from == text.len() {
            return at == pattern.len();
        }
        if let Some(next) = one(&pattern[at..], text[from]) {
            (at, from) = (at + next, from + 1);
            continue;
        }
        let Some((star_at, star_from)) = star else { return false };
        star = Some((star_at, star_from + 1));
        (at, from) = (star_at + 1, star_from + 1);
    }
}

/// How many bytes of `pattern` match the one byte `byte`.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'\\' => (*pattern.get(1)? == byte).then_some(2),
        b'[' => {
            let negated = pattern.get(1) == Some(&b'^');
            let first = 1 + usize::from(negated);
            let end = first + pattern.get(first..)?.iter().position(|byte| *byte == b']').filter(|len| *len > 0)?;
            let (mut at, mut found) = (first, false);
            while at < end {
                let is_range = at + 2 < end && pattern[at + 1] == b'-';
                let last = if is_range { pattern[at + 2] } else { pattern[at] };
                found |= (pattern[at]..=last).contains(&byte);
                at += if is_range { 3 } else { 1 };
            }
            (found != negated).then_some(end + 1)
        }
        literal => (literal == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_the_kubelet_says() {
        // The documentation's examples, and its own tests' cases.
        let cases = [
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.us-east-1.amazonaws.com", "app", true),
            ("*.dkr.ecr.*.amazonaws.com", "dkr.ecr.us-east-1.amazonaws.com", "app", false),
            ("gcr.io", "gcr.io", "project/app", true),
            ("gcr.io", "eu.gcr.io", "project/app", false),
            ("*.gcr.io", "eu.gcr.io", "project/app", true),
            ("*.io", "eu.gcr.io", "app", false),
            ("*.azurecr.io", "team.azurecr.io", "app", true),
            ("app*.k8s.io", "app1.k8s.io", "x", true),
            ("k8s.*", "k8s.io", "x", true),
            ("registry.io:8080/path", "registry.io:8080", "path/app", true),
            ("registry.io:8080/path", "registry.io:8080", "other/app", false),
            ("registry.io:8080", "registry.io", "app", false),
            ("registry.io", "registry.io:8080", "app", false),
            ("*.registry.io:8080/path", "a.registry.io:8080", "path", true),
            ("r?gistry.io", "registry.io", "app", true),
            ("[a-f]x.io", "cx.io", "app", true),
            ("[^a-f]x.io", "cx.io", "app", false),
            ("https://registry.io/", "registry.io", "app", true),
            ("a*b*c.io", "aXbYbZc.io", "app", true),
            ("a*b*c.io", "aXbYbZ.io", "app", false),
            ("[", "x", "app", false),
        ];
        for (pattern, registry, repository, expected) in cases {
            assert_eq!(matches(pattern, registry, repository), expected, "{pattern} {registry}/{repository}");
        }
    }

    #[test]
    fn keys_lose_what_old_tools_wrote_around_them() {
        for (text, expected) in [
            ("https://index.docker.io/v1/", "index.docker.io"),
            ("http://r.test:5000/v2", "r.test:5000"),
            ("r.test/v2/team/", "r.test/team"),
            ("r.test/team", "r.test/team"),
        ] {
            assert_eq!(key(text), expected);
        }
    }
}
