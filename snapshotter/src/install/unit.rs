//! The systemd unit of the node's daemon.

use std::path::Path;

use super::Settings;

/// The unit's name.
pub const UNIT_NAME: &str = "hermes.service";
/// Where the unit goes.
pub const UNIT_PATH: &str = "/etc/systemd/system/hermes.service";
/// What starts the unit with the machine.
pub const WANTS_PATH: &str = "/etc/systemd/system/multi-user.target.wants/hermes.service";
/// The first line, by which a unit is known to be ours.
pub const UNIT_MARK: &str =
    "# Written by `hermes node install`; drop-ins (systemctl edit hermes) are kept, changes here are not.";

/// The unit's text.
pub fn unit(settings: &Settings) -> String {
    let mut command = vec![settings.binary.display().to_string(), "node".to_owned(), "--state".to_owned()];
    command.push(settings.state.display().to_string());
    command.extend(settings.node_arguments.iter().cloned());
    let command = command.iter().map(|part| quote(part)).collect::<Vec<_>>().join(" ");
    let socket = settings.socket.display();
    let runtime = runtime_directory(&settings.socket);
    let state = settings.state.display();
    format!(
        r#"{UNIT_MARK}
[Unit]
Description=Hermes, lazily loaded container images
# containerd asks the daemon for the containers that it restarts, so the daemon comes first and goes last. No order
# after the network: the daemon serves what it has without one, and needs none to start.
Before=containerd.service
RequiresMountsFor={state}
# It is tried again for ever: while it is away, containers wait for their files.
StartLimitIntervalSec=0

[Service]
# Ready means that it answers containerd and that trees of earlier daemons are served again.
Type=notify
NotifyAccess=main
ExecStart={command}
# Read by the daemon; containerd's configuration names the same socket.
Environment="HERMES_SNAPSHOTTER_SOCKET={socket}"
{runtime}
# The connections to the kernel's FUSE outlive the daemon here: reads wait while it restarts, and its successor goes on.
# One for layer files and one for each tree that is shown by FUSE alone.
FileDescriptorStoreMax=1024
# Also over `systemctl stop` and `start` (systemd 254; older ones keep them over `restart` only, and ignore this line).
FileDescriptorStorePreserve=yes
Restart=always
RestartSec=100ms
# The daemon ends in order. What it had started (helpers for credentials) is not waited for.
KillMode=mixed
TimeoutStopSec=30
# As containerd: were it killed for memory, every container on the node would wait.
OOMScoreAdjust=-999
# A descriptor for each layer, connection and request. As many as containerd may have.
LimitNOFILE=1048576
# On a node that starts pods, the pods wait for the daemon; five times an ordinary unit's share.
CPUWeight=500
# It makes no control groups.
Delegate=no
# Its mounts are for containerd and for containers: nothing here may give it a mount namespace of its own, so there is
# no PrivateTmp, ProtectSystem or the like.

[Install]
WantedBy=multi-user.target
"#
    )
}

/// `RuntimeDirectory` for a socket in a folder of its own below /run.
fn runtime_directory(socket: &Path) -> String {
    let folder = socket.parent().and_then(|parent| parent.strip_prefix("/run").ok());
    match folder.filter(|folder| folder.components().count() == 1) {
        Some(folder) => format!(
            "# Kept over restarts: containerd may be connected.\nRuntimeDirectory={}\nRuntimeDirectoryPreserve=yes",
            folder.display()
        ),
        None => "# The socket's folder is the administrator's.".to_owned(),
    }
}

/// One word of a command line, as systemd.service(5) reads it: quoted where needed, without specifiers and variables.
fn quote(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { escaped } else { format!("\"{escaped}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_systemd() {
        for (word, quoted) in [
            ("--listen", "--listen"),
            ("/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/tcp/4001"),
            ("a b", "\"a b\""),
            ("100%", "100%%"),
            ("$HOME", "\"$$HOME\""),
            ("say \"x\\y\"", "\"say \\\"x\\\\y\\\"\""),
            ("", "\"\""),
        ] {
            assert_eq!(quote(word), quoted);
        }
    }

    #[test]
    fn the_socket_gets_a_folder_of_its_own_only_below_run() {
        assert!(runtime_directory(Path::new("/run/hermes/snapshotter.sock")).contains("RuntimeDirectory=hermes\n"));
        for other in ["/run/snapshotter.sock", "/run/a/b/s.sock", "/var/lib/hermes/s.sock"] {
            assert!(!runtime_directory(Path::new(other)).contains("RuntimeDirectory"), "{other}");
        }
    }
}
