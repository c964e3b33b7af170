#!/usr/bin/env bash
# The ancestor's smoke test: write through the VFS, lose the local files, open again, and see the rows.
#
# Wants an S3 server at LIBSQL_BOTTOMLESS_ENDPOINT (default http://localhost:9000, what compose.yaml starts), the bucket
# LIBSQL_BOTTOMLESS_BUCKET (default libsql) and credentials where boto3 looks for them. Each run is a database of its own there,
# unless LIBSQL_BOTTOMLESS_DATABASE_ID says which.
set -euo pipefail

if ! command -v bottomless-wal >/dev/null; then
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" demo test
fi

export LIBSQL_BOTTOMLESS_DATABASE_ID="${LIBSQL_BOTTOMLESS_DATABASE_ID:-smoke-$(date +%s)-$$}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

fail() {
    echo "smoke test FAILED: $*" >&2
    exit 1
}

query="SELECT typeof(v) || ':' || length(v) || ':' || CASE typeof(v) WHEN 'blob' THEN 'zeroes ' || (v = zeroblob(8193)) ELSE v END FROM test ORDER BY rowid;"
expected="integer:2:42
blob:8193:zeroes 1
text:3:hey"

echo "writing"
written=$(
    bottomless-wal shell <<SQL
.bail on
.open file:test.db?vfs=bottomless
PRAGMA journal_mode=wal;
DROP TABLE IF EXISTS test;
CREATE TABLE test(v);
INSERT INTO test VALUES (42);
INSERT INTO test VALUES (zeroblob(8193));
INSERT INTO test VALUES ('hey');
$query
SQL
) || fail "the shell that writes ended with an error"
[ "$written" = "wal
$expected" ] || fail "after writing, expected 'wal' and the three rows, saw:
$written"

echo "losing the local files: $(echo test.db*)"
rm -f test.db*

echo "opening again"
seen=$(
    bottomless-wal shell <<SQL
.bail on
.open file:test.db?vfs=bottomless
$query
PRAGMA integrity_check;
SQL
) || fail "the shell that reads ended with an error"
[ "$seen" = "$expected
ok" ] || fail "after the loss, expected the three rows, saw:
$seen"

echo "smoke test passed: the rows came back from the bucket"
