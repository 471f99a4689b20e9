# Who may do what: set-id bits, file capabilities and user namespaces, from the layers below and made here.
as_user() { setpriv --reuid 1000 --regid 1000 --clear-groups "$@" 2>&1; }

fact 'set-user-id from a layer' as_user /cases/bin/id-user
fact 'set-group-id from a layer' as_user /cases/bin/id-group
fact 'without the bit' as_user id
fact 'file capabilities from a layer' as_user sh -c '/cases/bin/capable /proc/self/status | grep Cap'
fact 'what they allow' as_user sh -c '/cases/bin/capable /cases/data/private | cksum'
fact 'what is refused without' as_user cat /cases/data/private
fact 'a user is added' useradd --create-home --uid 1000 --shell /bin/sh tester
fact 'its home' stat -c '%A %u:%g %n' /home/tester /home/tester/.profile
fact 'su' su tester -c 'id; umask; pwd'
fact 'passwd reads the shadow file for its user' su tester -c 'passwd --status | cut -d" " -f1,2'
fact 'chage reads it by its group' su tester -c 'chage --list tester | head -n 1 | cut -d: -f1'
fact 'mount is refused' su tester -c 'mount -t tmpfs none /mnt'
fact 'a copy keeps no capability' sh -c 'cp /cases/bin/capable /root/capable; stat -c %A /root/capable'
fact 'capabilities set here' python3 -c '
import os
os.setxattr("/root/capable", "security.capability", os.getxattr("/cases/bin/capable", "security.capability"))
os.chmod("/root", 0o755)
print(os.getxattr("/root/capable", "security.capability").hex())'
fact 'they work' as_user sh -c '/root/capable /proc/self/status | grep CapEff'
fact 'a write takes them away' sh -c 'echo >>/root/capable; python3 -c "import os; print(os.listxattr(\"/root/capable\"))"'
fact 'a chown takes the bit away' sh -c 'chown 1000 /cases/bin/id-user; stat -c "%A %u" /cases/bin/id-user'
fact 'a chmod gives it back' sh -c 'chown 0 /cases/bin/id-user; chmod 4755 /cases/bin/id-user; stat -c "%A %u" /cases/bin/id-user'
fact 'a copied-up program' as_user /cases/bin/id-user
fact 'a namespace of the user' as_user unshare --user --map-root-user sh -c 'id -u; stat -c "%u:%g" /etc/passwd /cases/data/attributes'
