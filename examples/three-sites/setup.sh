#!/bin/sh
# Plays the operator and three administrators: provisions a federation, makes each clinic's key, cuts its part out of
# visits.csv, fills in its node.yaml, and enrols it. Usage:   setup.sh FOLDER SERVER_ADDRESS VISITS_CSV
set -eu
folder=$1 server=$2 visits=$3
mkdir -p "$folder"
cat >"$folder/federation.yaml" <<YAML
name: visits
server: $server
sites: [harbour, hill, market]
YAML
fedtune provision "$folder/federation.yaml" -o "$folder"

for site in harbour hill market; do
  [ -e "$folder/$site/node.key" ] && continue
  python -m zipfile -e "$folder/sites/$site.zip" "$folder"
  # Its own records: the header, and the lines that name it.
  awk -F, -v site="$site" 'NR == 1 || $2 == site' "$visits" >"$folder/$site/data.csv"
  # What an administrator would edit by hand.
  sed -i \
    -e 's/^  text: text /  text: note /' \
    -e 's/^  label: label /  label: ward /' \
    -e 's/^  unit: null # column/  unit: patient # column/' \
    -e 's/^  labels: \[.*\] #/  labels: [cardiology, dermatology, orthopaedics] #/' \
    -e 's/^  declared_size: 1000 /  declared_size: 150 /' \
    -e 's/^  threads: 2 /  threads: 1 /' \
    "$folder/$site/node.yaml"
  fedtune node init --config "$folder/$site/node.yaml" >"$folder/$site/enrolment.txt"
  # The operator compares the fingerprint that the site reads out by telephone.
  fedtune server "$folder/server" --enrol "$(head -n 1 "$folder/$site/enrolment.txt")" \
    --fingerprint "$(sed -n 's/^fingerprint //p' "$folder/$site/enrolment.txt")"
done
