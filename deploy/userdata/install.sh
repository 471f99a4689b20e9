#!/bin/sh
# Puts Hermes on a node that has no DaemonSet: from a cloud's user data, an image build, or by hand.
#
#   install.sh --url URL --sha256 HEX [OPTION]... [-- ARGUMENT OF `hermes node`]...
#   install.sh --uninstall [--drain SECONDS] [--purge]
#
# It downloads the program, compares it with the checksum, and gives the rest to `hermes node install`: a systemd service and
# a few keys in containerd's configuration, all of it or nothing. Run it again with the same values and nothing changes; with
# another program or other arguments, the daemon is exchanged, which containers do not notice.
#
#   --url URL                where the program is (https, http on a host that you trust, or file)
#   --sha256 HEX             what it has to be; nothing is run before it is
#   --restart-containerd     have containerd read its configuration now; containers keep running
#   --no-set-default         Kubernetes uses Hermes only for runtimes that name it
#   --containerd-config PATH containerd's configuration, where it is not /etc/containerd/config.toml
#   --containerd PATH        the containerd to ask, where it is not the one on the usual path
#   --state DIR              the daemon's folder, where it is not /var/lib/hermes
#
# For example, a node of a controller that runs elsewhere:
#
#   install.sh --url https://files.example/hermes-0.1.0 --sha256 1f2e... --restart-containerd -- \
#     --listen "$ADDRESS:4001" --controller controller.example:7443 --controller-ca /etc/hermes-ca.pem \
#     --controller-token /etc/hermes-token --node-name "$NAME"
#
# Exit codes: 0 done, 2 wrong usage, 4 not root, 5 the download failed, 6 it is not what the checksum says; else that of `hermes node`.
set -eu

say() {
  echo "hermes install: $*" >&2
}

fail() { # fail CODE TEXT
  code=$1
  shift
  say "$*"
  exit "$code"
}

usage() {
  fail 2 "$*; see the head of this file"
}

download() { # download URL FILE
  case $1 in
    https://*)
      if command -v curl >/dev/null; then
        curl --proto '=https' --proto-redir '=https' --fail --silent --show-error --location --retry 5 \
          --connect-timeout 20 --max-time 600 --max-filesize "$size_max" --output "$2" "$1"
      elif command -v wget >/dev/null; then
        wget --https-only --quiet --tries 5 --timeout 60 --output-document "$2" "$1"
      else
        fail 5 "neither curl nor wget is here"
      fi
      ;;
    http://*)
      if command -v curl >/dev/null; then
        curl --proto '=http,https' --fail --silent --show-error --location --retry 5 \
          --connect-timeout 20 --max-time 600 --max-filesize "$size_max" --output "$2" "$1"
      elif command -v wget >/dev/null; then
        wget --quiet --tries 5 --timeout 60 --output-document "$2" "$1"
      else
        fail 5 "neither curl nor wget is here"
      fi
      ;;
    file:///*) cp "${1#file://}" "$2" ;;
    *) usage "the URL begins with https://, http:// or file:///" ;;
  esac
}

sum_of() { # sum_of FILE
  sha256sum "$1" | cut -d' ' -f1
}

# All of the script is read before anything is done: a download of it that was cut short does nothing.
main() {
  # The program has 130 MB with its debug information.
  size_max=1000000000
  binary=/usr/local/bin/hermes
  url='' sha256='' restart='' default='' config='' containerd='' state='' uninstall='' drain='' purge=''
  while [ $# -gt 0 ]; do
    case $1 in
      --url | --sha256 | --containerd-config | --containerd | --state | --drain)
        [ $# -ge 2 ] || usage "$1 has no value"
        case $1 in
          --url) url=$2 ;;
          --sha256) sha256=$(printf %s "$2" | tr '[:upper:]' '[:lower:]') ;;
          --containerd-config) config=$2 ;;
          --containerd) containerd=$2 ;;
          --state) state=$2 ;;
          --drain) drain=$2 ;;
        esac
        shift
        ;;
      --restart-containerd) restart=yes ;;
      --no-set-default) default=no ;;
      --uninstall) uninstall=yes ;;
      --purge) purge=yes ;;
      --)
        shift
        break
        ;;
      *) usage "'$1' is no option" ;;
    esac
    shift
  done
  [ "$(id -u)" = 0 ] || fail 4 "only root may do that"

  if [ -n "$uninstall" ]; then
    [ -x "$binary" ] || fail 0 "hermes is not here"
    exec "$binary" node uninstall --restart-containerd ${state:+--state "$state"} ${drain:+--drain "$drain"} \
      ${purge:+--purge}
  fi

  if [ -z "$url" ] || [ -z "$sha256" ]; then
    usage "give --url and --sha256"
  fi
  case $sha256 in
    *[!0-9a-f]*) usage "the checksum is no SHA-256 in hex" ;;
  esac
  [ ${#sha256} = 64 ] || usage "the checksum is no SHA-256 in hex"

  # Kept until it has been copied to its place; on a disk from which programs may be run.
  work=$(mktemp -d /usr/local/bin/.hermes-install.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  if [ -f "$binary" ] && [ "$(sum_of "$binary")" = "$sha256" ]; then
    say "the program is here already"
    program=$binary
  else
    program=$work/hermes
    download "$url" "$program" || fail 5 "cannot download $url"
    [ "$(sum_of "$program")" = "$sha256" ] || fail 6 "what $url gives has another checksum; nothing was changed"
    chmod 755 "$program"
    "$program" --version >/dev/null || fail 7 "the program does not run here: it needs glibc 2.34 or newer"
  fi

  report=$("$program" node install ${restart:+--restart-containerd} ${default:+--no-set-default} \
    ${config:+--containerd-config "$config"} ${containerd:+--containerd "$containerd"} ${state:+--state "$state"} -- "$@")
  printf '%s\n' "$report"
  # Another program, or other arguments, with a daemon that runs.
  case $report in
    *"next: systemctl restart hermes"*) systemctl restart hermes && say "the daemon was exchanged" ;;
  esac
}

main "$@"
