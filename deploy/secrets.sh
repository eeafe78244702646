#!/bin/sh
# Make the three files of secrets that docker-compose.yml mounts, with random passwords: sh deploy/secrets.sh [FOLDER]
set -eu
folder=${1:-$(dirname "$0")/secrets}
if [ -e "$folder/earmark.env" ]; then
    echo "$folder is there already: the databases know those passwords." >&2
    exit 1
fi
password() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
redis=$(password)
postgres=$(password)
flower=$(password)
ui=$(password)

# Containers read the files as other users, so the files are readable and the folder is not.
mkdir -p -m 700 "$folder"
umask 022
printf '%s' "$postgres" > "$folder/postgres_password"
# The user may use Earmark's keys only, and can neither configure nor empty the server. It needs every
# channel (&*), because Celery subscribes by patterns.
printf 'user default off\nuser earmark on >%s ~earmark:* &* +@all -@admin -@dangerous +info\n' "$redis" \
    > "$folder/valkey.conf"
cat > "$folder/earmark.env" << END
EARMARK_BROKER__URL=redis://earmark:$redis@redis:6379/0
EARMARK_DATABASE__URL=postgresql://earmark:$postgres@postgres:5432/earmark
EARMARK_FLOWER__BASIC_AUTH=earmark:$flower
EARMARK_UI_TOKEN=$ui
END
echo "Made $folder; the last two lines of earmark.env are the passwords of Flower and of the page (ui)."
