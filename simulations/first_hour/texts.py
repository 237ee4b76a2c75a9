"""By hand, in the session of service: texts of the default data, labelled and not: `texts.py CSV TXT`."""

import csv
import sys
from pathlib import Path

from fedtune.config.schema import DataConfig
from fedtune.data.sources.load import load_corpus

_, test = load_corpus(DataConfig(), 0)
assert test.sites is not None
with Path(sys.argv[1]).open("w", encoding="utf-8", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["text", "label", "site"])
    for row in range(0, len(test.texts), 5):
        rows.writerow([test.texts[row], test.label_names[test.labels[row]], test.sites[row]])
Path(sys.argv[2]).write_text(
    "\n".join(text.replace("\n", " ") for text in test.texts[1::5]), encoding="utf-8"
)
