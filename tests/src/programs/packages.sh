# apt with a repository of one package, and dpkg's own checks.
set -eu
export DEBIAN_FRONTEND=noninteractive

# A package with what packages have: programs, configuration, a link, a set-id bit, scripts, a changed file of another's.
mkdir -p /build/DEBIAN /build/usr/bin /build/etc /build/usr/share/doc/hermes-case /repository
printf 'Package: hermes-case\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDepends: libc6\nDescription: a case\n' >/build/DEBIAN/control
echo /etc/hermes-case.conf >/build/DEBIAN/conffiles
printf '#!/bin/sh\necho configured >>/etc/hermes-case.state\nldconfig\n' >/build/DEBIAN/postinst
chmod 755 /build/DEBIAN/postinst
printf '#!/bin/sh\necho hermes-case runs\n' >/build/usr/bin/hermes-case
chmod 4755 /build/usr/bin/hermes-case
ln -s hermes-case /build/usr/bin/hermes-case-link
echo setting >/build/etc/hermes-case.conf
gzip -9nc /etc/hosts >/build/usr/share/doc/hermes-case/changelog.gz
dpkg-deb --build --root-owner-group /build /repository/hermes-case_1.0_all.deb >/dev/null
cd /repository
{ dpkg-deb --field hermes-case_1.0_all.deb; echo "Filename: ./hermes-case_1.0_all.deb"; echo "Size: $(stat -c %s hermes-case_1.0_all.deb)"
  echo "SHA256: $(sha256sum hermes-case_1.0_all.deb | cut -d' ' -f1)"; echo; } >Packages
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] copy:/repository ./' >/etc/apt/sources.list
fact 'apt-get update' sh -c 'apt-get -qq update 2>&1; echo $?'
fact 'apt-get install' sh -c 'apt-get -qq install --yes hermes-case >/var/log/case.log 2>&1; echo $?; grep -c hermes-case /var/log/case.log'
fact 'what it installed' sh -c 'dpkg --listfiles hermes-case | xargs -d "\n" stat -c "%A %u:%g %N" | sort'
fact 'it runs' hermes-case-link
fact 'its script ran' cat /etc/hermes-case.state
fact 'status of all packages' sh -c 'dpkg-query --show --showformat "\${db:Status-Abbrev} \${Package} \${Version}\n" | sort | cksum'
fact 'files of packages are what they should be' dpkg --verify coreutils dpkg perl-base libc-bin python3.11-minimal
fact 'apt-get reinstall and purge' sh -c 'apt-get -qq install --reinstall --yes hermes-case >/dev/null 2>&1; apt-get -qq purge --yes hermes-case >/dev/null 2>&1; echo $?; ls /usr/bin | grep -c hermes-case'
fact 'dpkg divert' sh -c 'dpkg-divert --rename --add /usr/bin/tac; ls /usr/bin/tac*; dpkg-divert --rename --remove /usr/bin/tac; ls /usr/bin/tac*'
fact 'alternatives' sh -c 'update-alternatives --install /usr/bin/hermes-editor hermes-editor /usr/bin/sort 5 >/dev/null; readlink -f /usr/bin/hermes-editor'
