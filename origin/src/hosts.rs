//! containerd's `hosts.toml`: which hosts stand in for a registry, and how they are talked to.
//!
//! The layout and the rules are containerd's (docs/hosts.md of its repository): for the registry `host:port` the first
//! folder of `host_port_`, `host:port` and `_default` that exists counts, and no other. In it, `hosts.toml` names mirrors
//! in order, and at its top the registry itself; a folder without that file may hold certificates in docker's way
//! (`*.crt`, and `*.cert` with `*.key`). Files are read when an image is opened.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use serde::Deserialize;
use thiserror::Error;

use super::tls::{ClientCertificate, TlsSettings};

/// Bytes: the longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Hosts of one registry that are tried; each failed one costs a reader time.
const MAX_HOSTS: usize = 32;

/// The folder for registries that have none of their own.
const DEFAULT_FOLDER: &str = "_default";

/// Mirrors that cannot be known.
#[derive(Debug, Error)]
pub enum HostsError {
    /// A file or folder is there but cannot be read.
    #[error("the mirrors in {} cannot be read: {source}; check its permissions", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file makes no sense.
    #[error("the mirrors in {} are malformed: {reason}; compare it with containerd's docs/hosts.md", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// What has a digest: manifests and blobs.
    pub(super) pull: bool,
    /// Which digest a tag stands for.
    pub(super) resolve: bool,
}

impl Capabilities {
    pub(super) const ALL: Self = Self { pull: true, resolve: true };
}

/// One host that is asked for a registry's images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// Scheme, host, port and path up to and with `/v2` (or whatever `override_path` says); `None` for the registry's
    /// own usual place.
    pub(super) base: Option<Url>,
    pub(super) capabilities: Capabilities,
    pub(super) tls: TlsSettings,
    /// Sent with each request to this host, and to no other.
    pub(super) headers: HeaderMap,
}

#[derive(Debug, Default, Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    own: HostTable,
}

/// A string, or several of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// One file with certificate and key, several, or pairs of files.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<OneOrMany>),
}

// containerd ignores what it does not know, so newer files work here too.
#[derive(Debug, Default, Deserialize)]
struct HostTable {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: toml::Table,
    #[serde(default)]
    override_path: bool,
}

/// The hosts for `registry` (as in references), in the order in which they are tried, the registry itself last; just
/// that where nothing is configured. Blocks on the disk.
pub(super) fn load(folder: &Path, registry: &str) -> Result<Vec<Host>, HostsError> {
    let Some(folder) = find_folder(folder, registry)? else {
        return Ok(vec![Host::registry_itself()]);
    };
    let path = folder.join("hosts.toml");
    let failed = |source| HostsError::Io { path: path.clone(), source };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return docker_certificates(&folder),
        Err(error) => return Err(failed(error)),
    };
    let malformed = |reason: String| HostsError::Malformed { path: path.clone(), reason };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(malformed(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    parse(&text, &folder).map_err(malformed)
}

/// The folder that counts for `registry`.
fn find_folder(folder: &Path, registry: &str) -> Result<Option<PathBuf>, HostsError> {
    // References cannot say such a name; a folder's name must not lead elsewhere all the same.
    if registry.is_empty() || registry.contains('/') || registry.starts_with('.') {
        return Ok(None);
    }
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':').filter(|(host, _)| !host.is_empty()) {
        names.push(format!("{host}_{port}_"));
    }
    names.extend([registry.to_owned(), DEFAULT_FOLDER.to_owned()]);
    for name in names {
        let path = folder.join(name);
        match std::fs::metadata(&path) {
            Ok(_) => return Ok(Some(path)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(source) => return Err(HostsError::Io { path, source }),
        }
    }
    Ok(None)
}

fn parse(text: &str, folder: &Path) -> Result<Vec<Host>, String> {
    // `header` may hold a password, so of the parser's message only the first part is repeated, which does not quote.
    let file: HostsFile = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        format!("line {line}: {}", error.message())
    })?;
    if file.host.len() >= MAX_HOSTS {
        return Err(format!("it has more than {MAX_HOSTS} hosts"));
    }
    let mut hosts = Vec::new();
    for (server, table) in file.host {
        let table: HostTable =
            table.try_into().map_err(|error: toml::de::Error| format!("the host '{server}': {}", error.message()))?;
        hosts.push(host(Some(&server), table, folder).map_err(|reason| format!("the host '{server}': {reason}"))?);
    }
    let server = file.server.as_deref().filter(|server| !server.is_empty());
    hosts.push(host(server, file.own, folder).map_err(|reason| format!("the server: {reason}"))?);
    Ok(hosts)
}

impl Host {
    fn registry_itself() -> Self {
        let (tls, headers) = Default::default();
        Self { base: None, capabilities: Capabilities::ALL, tls, headers }
    }
}

fn host(server: Option<&str>, table: HostTable, folder: &Path) -> Result<Host, String> {
    let base = server.map(|server| base(server, table.override_path)).transpose()?;
    let capabilities = match &table.capabilities {
        None => Capabilities::ALL,
        Some(names) if names.is_empty() => Capabilities::ALL,
        Some(names) => {
            let unknown = names.iter().find(|name| !matches!(name.as_str(), "pull" | "resolve" | "push" | "referrers"));
            if let Some(unknown) = unknown {
                return Err(format!("'{unknown}' is not a capability; they are pull, resolve and push"));
            }
            let has = |wanted: &str| names.iter().any(|name| name == wanted);
            Capabilities { pull: has("pull"), resolve: has("resolve") }
        }
    };
    let at = |path: String| folder.join(path);
    let client = match table.client {
        None => Vec::new(),
        Some(Client::One(one)) => vec![ClientCertificate { certificate: at(one), key: None }],
        Some(Client::Many(many)) => many.into_iter().map(|one| client(one, folder)).collect::<Result<_, _>>()?,
    };
    let mut headers = HeaderMap::new();
    for (name, value) in table.header {
        // The value is not repeated: it may be a secret.
        let values = value.try_into::<OneOrMany>().map_err(|_| format!("the header '{name}' is not text"))?;
        let name: HeaderName = name.parse().map_err(|_| format!("'{name}' is not the name of a header"))?;
        for value in values.into_vec() {
            let value = HeaderValue::from_str(&value);
            let mut value = value.map_err(|_| format!("the header '{name}' has characters that cannot be sent"))?;
            value.set_sensitive(true);
            headers.append(name.clone(), value);
        }
    }
    let ca = table.ca.map_or_else(Vec::new, OneOrMany::into_vec).into_iter().map(at).collect();
    let skip_verify = table.skip_verify.unwrap_or(false);
    Ok(Host { base, capabilities, tls: TlsSettings { ca, client, skip_verify }, headers })
}

fn client(entry: OneOrMany, folder: &Path) -> Result<ClientCertificate, String> {
    let mut files = entry.into_vec().into_iter().map(|path| folder.join(path));
    match (files.next(), files.next().filter(|key| key != folder), files.next()) {
        (Some(certificate), key, None) => Ok(ClientCertificate { certificate, key }),
        _ => Err("client: each entry is one file, or a certificate and its key".to_owned()),
    }
}

/// Where a host's API begins: below `/v2`, unless its path is to be taken as it stands.
fn base(server: &str, override_path: bool) -> Result<Url, String> {
    let has_scheme = server.starts_with("http://") || server.starts_with("https://");
    let text = if has_scheme { server.to_owned() } else { format!("https://{server}") };
    let mut url: Url = text.parse().map_err(|error| format!("it is not an address: {error}"))?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err("it is not an address: there is no host".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some() {
        return Err("an address may have a scheme, a host, a port and a path only".to_owned());
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") { path } else { format!("{path}/v2") };
    url.set_path(&path);
    Ok(url)
}

/// Certificates as docker's tools lay them out.
fn docker_certificates(folder: &Path) -> Result<Vec<Host>, HostsError> {
    let failed = |source| HostsError::Io { path: folder.to_owned(), source };
    let mut host = Host::registry_itself();
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    for path in paths {
        match path.extension().and_then(|kind| kind.to_str()) {
            Some("crt") => host.tls.ca.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key"));
                host.tls.client.push(ClientCertificate { certificate: path, key });
            }
            _ => {}
        }
    }
    Ok(vec![host])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<Host> {
        parse(text, Path::new("/d")).unwrap_or_else(|error| panic!("{error}"))
    }

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_ref().map_or("", Url::as_str)).collect()
    }

    #[test]
    fn mirrors_keep_the_order_of_the_file_and_the_server_is_last() {
        let hosts = parsed(
            r#"
            server = "https://registry-1.docker.io"
            [host."https://z.test"]
              capabilities = ["pull"]
            [host."http://a.test:5000/proxy"]
              capabilities = ["pull", "resolve", "push"]
            [host."m.test/x/v2/"]
            [host."https://o.test/as/it/is"]
              override_path = true
              dial_timeout = "1s"
            "#,
        );
        let expected = [
            "https://z.test/v2",
            "http://a.test:5000/proxy/v2",
            "https://m.test/x/v2",
            "https://o.test/as/it/is",
            "https://registry-1.docker.io/v2",
        ];
        assert_eq!(bases(&hosts), expected);
        assert_eq!(hosts[0].capabilities, Capabilities { pull: true, resolve: false });
        assert_eq!(hosts[1].capabilities, Capabilities::ALL);
        assert_eq!(bases(&parsed("")), [""], "the registry itself");
    }

    #[test]
    fn certificates_and_headers_have_every_form_of_containerd() {
        let hosts = parsed(
            r#"
            ca = "own.crt"
            skip_verify = true
            [host."https://a.test"]
              ca = ["one.crt", "/abs/two.crt"]
              client = "both.pem"
              [host."https://a.test".header]
                x-one = "1"
                x-many = ["a", "hunter2"]
            [host."https://b.test"]
              client = [["c.cert", "c.key"], ["d.pem", ""], "e.pem"]
            "#,
        );
        let path = |text: &str| PathBuf::from(text);
        assert_eq!(hosts[0].tls.ca, [path("/d/one.crt"), path("/abs/two.crt")]);
        assert_eq!(hosts[0].tls.client, [ClientCertificate { certificate: path("/d/both.pem"), key: None }]);
        assert_eq!(hosts[0].headers.get_all("x-many").iter().count(), 2);
        assert!(!format!("{:?}", hosts[0]).contains("hunter2"));
        let pairs: Vec<_> = hosts[1].tls.client.iter().map(|pair| (&pair.certificate, pair.key.as_deref())).collect();
        let (c, d, e) = (path("/d/c.cert"), path("/d/d.pem"), path("/d/e.pem"));
        assert_eq!(pairs, [(&c, Some(Path::new("/d/c.key"))), (&d, None), (&e, None)]);
        assert!(hosts[2].tls.skip_verify && hosts[2].tls.ca == [path("/d/own.crt")]);
    }

    #[test]
    fn what_makes_no_sense_is_named_without_its_secrets() {
        let cases = [
            ("[host", "line 1"),
            ("\n\nserver = 7", "line 3"),
            ("[host.\"ftp://a.test/?x\"]", "ftp"),
            ("[host.\"https://a:b@a.test\"]", "a port and a path only"),
            ("[host.\"https://a.test\"]\ncapabilities = [\"fly\"]", "'fly' is not a capability"),
            ("[host.\"https://a.test\"]\nclient = [[\"a\", \"b\", \"c\"]]", "client"),
            ("[header]\nx-a = 7", "'x-a' is not text"),
            ("[header]\nx-a = \"hunter2\\n\"", "characters that cannot be sent"),
        ];
        for (text, expected) in cases {
            let error = parse(text, Path::new("/d")).expect_err(text);
            assert!(error.contains(expected) && !error.contains("hunter2"), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_folder_that_exists_counts() {
        let root = tempfile::tempdir().expect("a folder");
        let load = |registry: &str| load(root.path(), registry).unwrap_or_else(|error| panic!("{error}"));
        let write = |folder: &str, file: &str, text: &str| {
            let folder = root.path().join(folder);
            std::fs::create_dir_all(&folder).expect("made");
            std::fs::write(folder.join(file), text).expect("written");
        };
        assert_eq!(load("r.test:5000"), [Host::registry_itself()]);
        write("_default", "hosts.toml", "server = \"https://default.test\"");
        assert_eq!(bases(&load("r.test:5000")), ["https://default.test/v2"]);
        write("r.test:5000", "hosts.toml", "server = \"https://colon.test\"");
        assert_eq!(bases(&load("r.test:5000")), ["https://colon.test/v2"]);
        write("r.test_5000_", "hosts.toml", "server = \"https://plain.test\"");
        assert_eq!(bases(&load("r.test:5000")), ["https://plain.test/v2"]);
        assert_eq!(bases(&load("r.test")), ["https://default.test/v2"]);
        for file in ["ca.crt", "me.cert", "me.key", "README"] {
            write("certs.test", file, "");
        }
        let tls = &load("certs.test")[0].tls;
        assert!(tls.ca[0].ends_with("ca.crt") && tls.client[0].certificate.ends_with("me.cert"), "{tls:?}");
        assert!(tls.client[0].key.as_ref().is_some_and(|key| key.ends_with("me.key")));
        assert_eq!(bases(&load("../certs.test")), [""]);
    }
}
