#!/usr/bin/env bash
# Installs the browser that the report is tested in, where there is none: Debian's Chromium, as root.
set -euo pipefail
for browser in chromium chromium-browser google-chrome; do
    command -v "$browser" >/dev/null && exit 0
done
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
