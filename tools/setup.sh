#!/bin/sh
# Make the virtual environment and install the project into it, with what tests need.
# Being root on Debian or Ubuntu, also install the system tools that are missing; where
# that cannot be done, say so and go on: the demo names what it lacks, tests skip.
# The kernel of the guests is unpacked into the virtual environment, and not installed.
set -eu
venv=${1:-.venv}
python=${PYTHON:-python3}

missing=""
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
command -v qemu-img >/dev/null 2>&1 || missing="$missing qemu-utils"
command -v mke2fs >/dev/null 2>&1 || missing="$missing e2fsprogs"
command -v mkfs.xfs >/dev/null 2>&1 || missing="$missing xfsprogs"
command -v mergerfs >/dev/null 2>&1 || missing="$missing mergerfs"
command -v nbdkit >/dev/null 2>&1 || missing="$missing nbdkit nbdkit-plugin-python"
command -v nbdcopy >/dev/null 2>&1 || missing="$missing libnbd-bin"
command -v fio >/dev/null 2>&1 || missing="$missing fio"
command -v qemu-system-x86_64 >/dev/null 2>&1 || missing="$missing qemu-system-x86"
# The other busybox needs libraries, which a guest has not.
{ command -v busybox && ! ldd "$(command -v busybox)"; } >/dev/null 2>&1 ||
    missing="$missing busybox-static"
command -v cpio >/dev/null 2>&1 || missing="$missing cpio"

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing$missing"
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086 # a list of package names
        { apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing; } \
            >/dev/null || echo "could not install$missing; going on without" >&2
    else
        echo "not installed:$missing (as root: apt-get install$missing)" >&2
    fi
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; name one with PYTHON=..." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
# An editable install has no bytecode; a start without it takes half as long again.
"$venv/bin/python" -m compileall -q addcow_mp

[ -e "$venv/guest" ] || "$(dirname "$0")/guest_kernel.sh" "$venv/guest" ||
    echo "no kernel for guests (tools/guest_kernel.sh unpacks Debian's); going on without" >&2
