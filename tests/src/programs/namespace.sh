# In a user namespace: who owns what the layers hold, who owns what is made here, and whether set-id bits work in it.

fact 'this user' id
fact 'owners' stat -c '%u:%g %a %n' / /etc/passwd /etc/shadow /cases/data/attributes /cases/sticky/mine /cases/copy-up/mode
fact 'made here' sh -c 'echo made >/made; mkdir /folder; stat -c "%u:%g %n" /made /folder'
fact 'copied up' sh -c 'echo more >>/cases/copy-up/mode; stat -c "%u:%g %s %n" /cases/copy-up/mode'
fact 'owner changed' sh -c 'chown 1000:1001 /cases/copy-up/owner; stat -c "%u:%g %n" /cases/copy-up/owner'
fact 'an owner outside of the namespace' chown 70000 /cases/copy-up/owner
fact 'deleted' sh -c 'rm -r /cases/again; ls -d /cases/again'
fact 'renamed' sh -c 'mv /cases/tree /cases/tree-2; find /cases/tree-2 | sort'
fact 'set-user-id' setpriv --reuid 1000 --regid 1000 --clear-groups /cases/bin/id-user
fact 'file capabilities' setpriv --reuid 1000 --regid 1000 --clear-groups sh -c '/cases/bin/capable /cases/data/private | cksum'
fact 'another user' setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'cat /cases/data/listed | cksum; cat /cases/data/private'
