"""`data=hub`: one split of any Hugging Face data set, by name, as a Table.

Loading is by `datasets.load_dataset`, which keeps its own cache; once fetched, a data set works without
network. Class names come from the data set's own features, which are public. Data sets that are a Python
script are not supported by `datasets` 4, nor wanted: a script would run with the data in its hands.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any

from fedtune.config.quiet import hushed
from fedtune.config.schema import DataConfig
from fedtune.data.sources.columns import Table
from fedtune.errors import DataError, ResourceError

__all__ = ["PLACEHOLDER", "read_split"]

PLACEHOLDER = "OWNER/NAME"  # what conf/data/hub.yaml has in place of a data set


def read_split(config: DataConfig, split: str) -> Table:
    """Reads the columns in use of one split.

    Raises:
        DataError: the hub has no such data set, configuration or split.
        ResourceError: it is not in the local cache, and the hub cannot be reached.
    """
    if config.name == PLACEHOLDER:
        raise DataError(
            "data=hub needs data.name, the data set's name on the Hugging Face hub, such as stanfordnlp/sst2."
        )
    dataset = _load(config, split)
    where = f"split {split!r} of {_title(config)}"
    used = {config.text, config.label, config.text_pair, config.unit, config.site}
    columns: dict[str, Any] = {
        name: dataset[name][:] if name in used else [] for name in dataset.column_names
    }
    names = getattr(dataset.features.get(config.label), "names", None)
    if names:
        # By name, not by position: data.labels may give the label set in another order.
        columns[config.label] = [
            names[i] if i is not None and 0 <= i < len(names) else i for i in columns[config.label]
        ]
    return Table(where=where, columns=columns, class_names=tuple(names) if names else None)


def _title(config: DataConfig) -> str:
    return f"{config.name!r}" + (f" ({config.subset})" if config.subset else "")


def _load(config: DataConfig, split: str) -> Any:
    import datasets
    import httpx
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    title = _title(config)
    try:
        with _quiet(datasets):
            return datasets.load_dataset(config.name, config.subset, revision=config.revision, split=split)
    except DatasetNotFoundError as error:
        raise DataError(
            f"There is no data set {config.name!r} on the Hugging Face hub that you may"
            f" read{f' at revision {config.revision!r}' if config.revision else ''}. Check data.name"
            " (owner/name), or log in with 'hf auth login' if it is private or gated."
        ) from error
    except ConnectionError as error:  # also what `datasets` raises in offline mode
        raise _no_network(title) from error
    except ValueError as error:
        raise _bad_choice(config, split, error) from error
    except DatasetGenerationError as error:
        raise DataError(
            f"The files of the data set {title} cannot be read as one table "
            f"({type(error.__cause__).__name__}). Check data.revision, or save it as Parquet files and use "
            "data=files with data.path."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            f"The data set {title} is a Python script, which fedtune does not run. Use a Parquet copy of it:"
            " many have one on the hub, under another owner or at data.revision=refs/convert/parquet."
        ) from error
    except FileNotFoundError as error:
        if type(error).__name__ == "LocalEntryNotFoundError":  # of huggingface_hub: not cached, not reached
            raise _no_network(title) from error
        raise DataError(
            f"The data set {title} has no data files: {str(error).rstrip('.')}. Check data.name and"
            " data.revision."
        ) from error
    except HfHubHTTPError as error:
        raise ResourceError(
            f"The Hugging Face hub does not give the data set {title}: {error.response.status_code}"
            f" {error.response.reason_phrase}. Try again later, or log in with 'hf auth login'."
        ) from error
    except httpx.HTTPError as error:  # the network went away on the way
        raise _no_network(title) from error
    except OSError as error:
        raise ResourceError(
            f"The data set {title} cannot be kept in the local cache: {error}. Free some space, or let"
            " HF_HOME name a folder that can be written."
        ) from error


def _no_network(title: str) -> ResourceError:
    return ResourceError(
        f"The data set {title} is not in the local cache, and the Hugging Face hub cannot be reached. Fetch"
        " it once where there is network and copy the cache (HF_HOME), or save it as Parquet files and use"
        " data=files with data.path, or use data=opinions."
    )


def _bad_choice(config: DataConfig, split: str, error: ValueError) -> DataError:
    """For a wrong split or configuration `datasets` raises a ValueError that lists the right ones."""
    message = " ".join(str(error).split())
    if "split" in message.lower() and split in message:
        known = [name for name in re.findall(r"'([^']+)'", message) if name != split]
        nearest = difflib.get_close_matches(split, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return DataError(
            f"The data set {_title(config)} has no split {split!r}; it has "
            f"{', '.join(known) or 'others'}.{hint} Set data.train_split and data.test_split."
        )
    return DataError(
        f"The data set {_title(config)} cannot be loaded: {message.rstrip('.')}. Check data.name and"
        " data.subset."
    )


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars or retry messages over fedtune's own display; the user's settings back afterwards."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with hushed("huggingface_hub"):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
