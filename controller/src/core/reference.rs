//! Names of images as pods write them, and what they mean.
//!
//! The rules are containerd's, which has them from Docker: what precedes the first slash is a host if it has a dot or a
//! colon, or is `localhost`, or has capitals; without one, the host is `docker.io`, and a single word is in its `library`.
//! Without a tag it is `latest`; with a digest, the tag says nothing.

/// Longest name that is looked at, in bytes: host, repository, tag and digest at their longest (253, 255, 128 and 71 by
/// the distribution specification), with room.
pub(super) const TEXT_LEN_MAX_BYTES: usize = 1024;
/// Longest repository with its host.
const REPOSITORY_LEN_MAX_BYTES: usize = 255 + 253;
const TAG_LEN_MAX_BYTES: usize = 128;

/// What `text` means in full, such as `docker.io/library/nginx:latest`; `None` when it can be no image of a registry.
pub(super) fn normalise(text: &str) -> Option<String> {
    if text.len() > TEXT_LEN_MAX_BYTES {
        return None;
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    if let Some(digest) = digest {
        digest.parse::<hermes_image::ids::Digest>().ok()?;
    }
    let (host, rest) = match rest.split_once('/') {
        Some((host, path)) if is_host(host) => (host, path),
        _ => ("docker.io", rest),
    };
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let path = if host == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
    let sound = is_valid_host(host) && path.split('/').all(is_component) && tag.is_none_or(is_tag);
    if !sound || host.len() + path.len() > REPOSITORY_LEN_MAX_BYTES {
        return None;
    }
    Some(match digest {
        Some(digest) => format!("{host}/{path}@{digest}"),
        None => format!("{host}/{path}:{}", tag.unwrap_or("latest")),
    })
}

/// The host and repository of a name in full.
pub(crate) fn repository(reference: &str) -> &str {
    let path_at = reference.find('/').map_or(0, |at| at + 1);
    let end = reference[path_at..].find(['@', ':']).map_or(reference.len(), |at| path_at + at);
    &reference[..end]
}

/// Whether a name in full stands for one image for ever.
pub(crate) fn is_pinned(reference: &str) -> bool {
    reference.contains('@')
}

fn is_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost" || text.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_valid_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !text.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let port_is_number = port.is_none_or(|port| port.parse::<u16>().is_ok());
    let literal = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let name_is_sound = match literal {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.split('.').all(|part| {
            let plain = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            !part.is_empty() && plain && !part.starts_with('-') && !part.ends_with('-')
        }),
    };
    port_is_number && name_is_sound
}

/// Lower-case letters and digits, between which stand one dot, one or two underscores, or dashes.
fn is_component(text: &str) -> bool {
    let is_inner = |c: char| matches!(c, '.' | '_' | '-');
    let plain = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || is_inner(c));
    let separators_are_sound = text
        .split(|c: char| !is_inner(c))
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'));
    plain && !text.is_empty() && !text.starts_with(is_inner) && !text.ends_with(is_inner) && separators_are_sound
}

fn is_tag(text: &str) -> bool {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    !text.is_empty() && text.len() <= TAG_LEN_MAX_BYTES && plain && !text.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a";

    #[test]
    fn names_mean_what_containerd_takes_them_for() {
        let cases = [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("index.docker.io/library/redis:7", "docker.io/library/redis:7"),
            ("docker.io/redis", "docker.io/library/redis:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("127.0.0.1:5000/a/b__c:v1", "127.0.0.1:5000/a/b__c:v1"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("MyHost/a", "MyHost/a:latest"),
            ("ghcr.io/a/b--c:V.1_2-x", "ghcr.io/a/b--c:V.1_2-x"),
        ];
        for (text, expected) in cases {
            assert_eq!(normalise(text).as_deref(), Some(expected), "{text}");
            assert_eq!(normalise(expected).as_deref(), Some(expected), "{expected} is in full already");
        }
        assert_eq!(
            normalise(&format!("nginx:1.27@{DIGEST}")).as_deref(),
            Some(format!("docker.io/library/nginx@{DIGEST}").as_str())
        );
    }

    #[test]
    fn what_names_no_image_is_nothing() {
        let long = format!("a/{}", "b".repeat(TEXT_LEN_MAX_BYTES));
        let cases = [
            "",
            ":",
            "@",
            "/",
            "a b",
            "oci:/etc",
            "A",
            "a/B",
            "a//b",
            "a/",
            "a:",
            "a:b:c",
            "a:-b",
            "a@sha256:00",
            "a..b/c",
            "x.y:port/a",
            "-a.b/c",
            "a/.b",
            "a/b___c",
            "a/b._c",
            "a\n",
            &long,
            "http://a.b/c",
        ];
        for text in cases {
            assert_eq!(normalise(text), None, "{text:?}");
        }
    }

    #[test]
    fn repositories_are_cut_out() {
        for (reference, expected) in [
            ("127.0.0.1:5000/a/b:v1", "127.0.0.1:5000/a/b"),
            ("docker.io/library/redis@sha256:00", "docker.io/library/redis"),
        ] {
            assert_eq!(repository(reference), expected);
        }
        assert!(is_pinned("a/b@sha256:00") && !is_pinned("a/b:c"));
    }
}
