# By hand, in the session of administrator: each clinic's data.csv (a third of visits.csv, its labels no and yes), its
# node.yaml, and what clinic-2 and clinic-3 type as clinic-1 did on the page.
set -eu
for number in 1 2 3; do
  site=clinic-$number
  [ -d "$site" ] || python -m zipfile -e "DIR/sites/$site.zip" .
  python - "$CLONE/examples/visits.csv" "$site/data.csv" "$number" <<'PYTHON'
import csv
import sys

visits, path, number = sys.argv[1:]
with open(visits, encoding="utf-8") as file, open(path, "w", encoding="utf-8", newline="") as out:
    rows = csv.writer(out)
    rows.writerow(["text", "label"])
    for row in csv.DictReader(file):
        if row["clinic"] == ("harbour", "hill", "market")[int(number) - 1]:
            rows.writerow([row["note"], "yes" if row["ward"] == "cardiology" else "no"])
PYTHON
  sed -i -e 's/^  declared_size: 1000 /  declared_size: 250 /' "$site/node.yaml"
  [ "$number" = 3 ] && sed -i -e 's/^approval: false /approval: true /' "$site/node.yaml"
  [ -e "$site/node.key" ] && continue
  fedtune node init --config "$site/node.yaml" >said
  fedtune server DIR/server --enrol "$(head -n 1 said)" --fingerprint "$(sed -n 's/^fingerprint //p' said)"
done
