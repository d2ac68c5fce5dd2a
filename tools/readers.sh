#!/bin/sh
# Tools that others wrote and our tests hold our files against, in a folder of their own: tools/readers.sh FOLDER
#   FOLDER/bin/model_signing   OpenSSF model signing, from the Python package index
#   FOLDER/bin/cosign          Sigstore's cosign, a Debian package that is unpacked, not installed
#   FOLDER/preflight/*.jar     PDFBox Preflight, a validator of PDF/A-1b, as Debian has it; needs java
# Needs no root and changes nothing outside FOLDER. What cannot be had is said in a line; the status is 0 all the same,
# and the tests that need it are skipped with their reason. Run it again to try again.
set -u
folder=${1:?usage: tools/readers.sh FOLDER}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder/bin" && folder=$(cd "$folder" && pwd)

without() { echo "tools/readers.sh: without $1: $2" >&2; }

get_model_signing() {
    "$folder/bin/model_signing" --version >/dev/null 2>&1 && return
    "${PYTHON:-python3}" -m venv "$folder/model-signing" >/dev/null 2>&1 || { without model_signing "no venv"; return; }
    # pyopenssl is a dependency that model-signing 1.1 does not declare.
    # shellcheck disable=SC2086
    "$folder/model-signing/bin/python" -m pip install -q --disable-pip-version-check --timeout 30 --retries 1 \
        ${PIP_FLAGS:-} -c "$here/constraints.txt" model-signing pyopenssl blake3 >"$folder/pip.log" 2>&1 ||
        { without model_signing "$(tail -n 1 "$folder/pip.log")"; return; }
    ln -sf ../model-signing/bin/model_signing "$folder/bin/model_signing"
}

# Unpack Debian packages under FOLDER/apt/unpacked: Debian's own mirror and keyring as this machine has them, an apt state of
# our own. unpack NAME SUITE PACKAGE…
unpack() {
    name=$1 suite=$2
    shift 2
    [ -n "$(command -v apt-get)" ] && [ -n "$(command -v dpkg-deb)" ] || { without "$name" "no apt-get here"; return 1; }
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=$(sed -n 's|^URIs: *\([^ ]*/debian/\{0,1\}\)$|\1|p; s|^deb \([^ ]*/debian/\{0,1\}\) .*|\1|p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null | head -n 1)
    [ -n "$mirror" ] && [ -r "$keyring" ] || { without "$name" "no Debian mirror is configured"; return 1; }
    apt=$folder/apt
    rm -rf "$apt"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/unpacked"
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$apt/sources.list"
    : >"$apt/status"
    options="-o Dir::Etc::SourceList=$apt/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State=$apt
        -o Dir::State::lists=$apt/lists -o Dir::State::status=$apt/status -o Dir::Cache=$apt/cache
        -o Acquire::Languages=none -o Acquire::http::Timeout=30 -o Acquire::Retries=1 -o APT::Sandbox::User=
        -o Debug::NoLocking=1"
    # shellcheck disable=SC2086
    (cd "$apt" && apt-get -q $options update && apt-get -q $options download "$@") >"$folder/apt.log" 2>&1 ||
        { without "$name" "$(tail -n 1 "$folder/apt.log")"; rm -rf "$apt"; return 1; }
    for package in "$apt"/*.deb; do dpkg-deb -x "$package" "$apt/unpacked"; done
}

get_cosign() {
    [ -x "$folder/bin/cosign" ] && return
    [ -n "$(command -v cosign)" ] && return
    unpack cosign sid cosign || return
    mv "$folder/apt/unpacked/usr/bin/cosign" "$folder/bin/cosign"
    rm -rf "$folder/apt"
    "$folder/bin/cosign" version >/dev/null 2>&1 || { without cosign "it does not run here"; rm -f "$folder/bin/cosign"; }
}

get_preflight() {
    [ -r "$folder/preflight/preflight.jar" ] && return
    [ -n "$(command -v java)" ] || { without preflight "no java here"; return; }
    unpack preflight bookworm libpdfbox2-java libfontbox2-java libcommons-logging-java libcommons-io-java \
        libjakarta-activation-java libactivation-java libjaxb-api-java libbcprov-java || return
    mkdir -p "$folder/preflight" && cp -L "$folder"/apt/unpacked/usr/share/java/*.jar "$folder/preflight/"
    rm -rf "$folder/apt"
}

get_model_signing
get_cosign
get_preflight
exit 0
