#!/bin/sh
# Makes the files of secrets that the compose file, the units and create-logins.sql use; keeps those that exist.
#
#     deploy/make-secrets.sh FOLDER HOST [USER]
#
# HOST is PostgreSQL's address as the processes reach it (`postgresql` in the compose file). As root the files get the
# USER that the processes run as, 10001 by default, as in the container. The keys of the provider are the sandbox's:
# replace them with your own.
set -eu
folder=$1 host=$2 user=${3:-10001}
case $host in
    '' | *[!][0-9A-Za-z.:_%-]*)
        echo "HOST: a name or an address, got '$host'" >&2
        exit 1
        ;;
    '['*) ;;
    *:*:*) host="[$host]" ;;
esac
umask 077
mkdir -p "$folder"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

keep() {
    if [ ! -s "$folder/$1" ]; then
        printf '%s\n' "$2" >"$folder/$1.part"
        mv -f "$folder/$1.part" "$folder/$1"
    fi
    chmod 0400 "$folder/$1"
}

keep postgres-password "$(random)"
for login in deploy api webhook worker analyst auditor; do
    keep "$login-database-url" "postgresql://login_$login:$(random)@$host/surety"
done
keep stripe-api-key sk_test_sandbox
keep stripe-webhook-secret whsec_sandbox
keep webhook-key "$(head -c 32 /dev/urandom | base64)"
if [ "$(id -u)" = 0 ]; then
    chown "$user" "$folder" "$folder"/*
fi
