# Boots a node. `$1` is its folder, `$2` the name of its control groups; then pairs of a name and a folder of programs.
#
# It sees this machine's programs, and has all else for itself: /etc, /var/lib, /var/log, /usr/local, /opt and /run, control
# groups of both versions whose root is its own, no unit but those in its folder, and systemd as its first process.
set -e
for group in /sys/fs/cgroup/*; do
  [ -e "$group/cgroup.procs" ] || continue
  mkdir -p "$group/$2"
  if [ -e "$group/cpuset.cpus" ]; then
    for each in cpus mems; do cat "$group/cpuset.$each" >"$group/$2/cpuset.$each"; done
    echo 1 >"$group/$2/cgroup.clone_children"
  fi
  echo $$ >"$group/$2/cgroup.procs"
done
exec unshare --mount --pid --fork --cgroup --uts --ipc --kill-child --propagation slave sh -ec '
node=$1
shift 2
while [ $# -gt 0 ]; do
  mkdir -p "$node/usr/local/programs/$1"
  mount --bind "$2" "$node/usr/local/programs/$1"
  shift 2
done
mount -t overlay -o "lowerdir=/etc,upperdir=$node/etc,workdir=$node/etc-work" overlay /etc
for each in var/lib var/log usr/local opt; do mount --rbind "$node/$each" "/$each"; done
for hidden in /run /usr/lib/systemd/system /usr/lib/systemd/system-generators; do mount -t tmpfs tmpfs "$hidden"; done
mkdir /run/lock
names=$(cd /sys/fs/cgroup && ls)
umount --recursive /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for name in $names; do
  mkdir "/sys/fs/cgroup/$name"
  case $name in
    unified) mount -t cgroup2 cgroup2 "/sys/fs/cgroup/$name" ;;
    systemd) mount -t cgroup -o none,name=systemd cgroup "/sys/fs/cgroup/$name" ;;
    *) mount -t cgroup -o "$name" cgroup "/sys/fs/cgroup/$name" ;;
  esac
done
mount -t proc proc /proc
# The kubelet sets these, which are those of the whole machine: it is shown them as set already.
mkdir /run/sysctl
for each in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  file=/run/sysctl/$(echo "${each%=*}" | tr / _)
  echo "${each#*=}" >"$file"
  mount --bind "$file" "/proc/sys/${each%=*}"
done
# What pods mount below a folder that is shared both ways is to be seen by all, as on a machine that systemd has booted.
mount --make-rshared /
# What was plugged in before the power went.
ip link delete cni0 2>/dev/null || true
exec env --ignore-environment PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=test \
  /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=false
' node "$@"
