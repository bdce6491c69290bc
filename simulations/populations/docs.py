"""Users who sort documentation of installed packages into private folders, over a real pretrained encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch

from federation.base import BaseModel
from federation.data.population import Batch, Part
from federation.errors import ConfigError, PopulationError
from federation.streams import Streams, UserIds
from simulations.populations.docs_base import DISTRIBUTION, HiddenStates, encoder_folder, hidden_states, sorter_base
from simulations.populations.docs_corpus import DocsCorpus, DocsSplit, Topic, docs_corpus

Documents = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocsPopulation:
    """Users 0..train_users - 1 train; the next `new_users` are new, and sort documents of projects never trained on.

    A user has one folder for each of `folders` topics, numbered in an order of its own: what the first folder holds,
    only its support says. An example is a document's number; its target the folder's.

    one_project: share of users all of whose topics come from one project, so that they are alike; the others draw
        topics from all projects of their split.
    support, query, test: documents of each part, the same number for each folder, none in two parts of a user.
    tokens: of a document that the encoder reads, from its start. layers: of the encoder that are adapted, the last.
    encoder: a folder with another BERT encoder (config.json, model.safetensors, tokenizer.json).

    Whoever makes one first waits some minutes: documentation is gathered, and the encoder's lower layers read it.
    Users are virtual and many share documents; different users' errors are independent only across projects.

    Raises ConfigError when an option is out of its range, PopulationError when the encoder's package is missing or the
    environment has too few topics.
    """

    train_users: int = 2000
    new_users: int = 500
    folders: int = 5
    one_project: float = 0.5
    support: int = 40
    query: int = 20
    test: int = 50
    tokens: int = 32
    layers: int = 1
    seed: int = 0
    encoder: str | None = None

    name = "docs"

    def __post_init__(self) -> None:
        self._check()
        encoder_folder(self.encoder)
        self._check_topics()
        _ = self._states  # in the process that makes the population first, not in each of its workers at once

    def _check(self) -> None:
        """Raises ConfigError."""
        for least, fields in ((0, ("train_users", "new_users")), (1, ("layers",)), (2, ("folders",)), (4, ("tokens",))):
            for field in fields:
                if getattr(self, field) < least:
                    raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if not 0 <= self.one_project <= 1:
            raise ConfigError(f"one_project is a share of the users within 0..1, got {self.one_project}")
        for part in get_args(Part):
            if getattr(self, part) < 1 or getattr(self, part) % self.folders:
                raise ConfigError(
                    f"{part} must be a multiple of the {self.folders} folders, as many documents for each, "
                    f"got {getattr(self, part)}"
                )

    def _check_topics(self) -> None:
        """Raises ConfigError where topics have too few documents, PopulationError where there are too few topics."""
        owned = sum(self._per_folder.values())
        if owned > self._per_topic:
            raise ConfigError(
                f"a topic has {self._per_topic} documents, support, query and test need {owned} for each folder; "
                "lower one of them"
            )
        for split, topics in self._topics.items():
            if len(topics) < self.folders or (self.one_project > 0 and not len(self._large_projects[split])):
                raise PopulationError(
                    f"the {split} users need {self.folders} topics, of one project for some, this environment has "
                    f"{len(topics)} in {len({topic.project for topic in topics})} projects; install more packages"
                )

    # The Population protocol

    def users(self, split: str) -> range:
        """The ids of "train" or "new"."""
        splits = {
            "train": range(self.train_users),
            "new": range(self.train_users, self.train_users + self.new_users),
        }
        if split not in splits:
            raise PopulationError(f"population 'docs' has the splits {list(splits)}, got {split!r}")
        return splits[split]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """Inputs (U, N) int64, numbers of documents, and targets (U, N) int64, folders.

        With size None, folders take turns: example n is of folder n % folders, so that a window from the start holds
        as many of each. Otherwise drawn without replacement when the user owns enough.
        """
        owned_un = self._documents(user_ids, part)
        if size is None:
            place_un = np.broadcast_to(np.arange(owned_un.shape[1]), owned_un.shape)
        else:
            draw = streams.distinct if size <= owned_un.shape[1] else streams.integers
            place_un = draw(f"examples/{part}", user_ids, owned_un.shape[1], size)
        inputs = torch.from_numpy(np.take_along_axis(owned_un, place_un, 1))
        return Batch(inputs, torch.from_numpy(place_un % self.folders), torch.ones(inputs.shape))

    def base_model(self) -> BaseModel:
        name = f"{self._encoder_name}, {self.tokens} tokens, layers adapted: {self.layers}"
        return sorter_base(self._states, encoder_folder(self.encoder), self.layers, self.folders, name)

    def groups(self, user_ids: UserIds) -> UserIds:
        """The number of the project for users all of whose topics are of one; each other user is a group of its own."""
        project_uf = self._project_t[self.topics(user_ids)]
        alone = project_uf.min(1) != project_uf.max(1)
        return np.where(alone, 1 + self._project_t.max() + np.asarray(user_ids), project_uf[:, 0])

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """Ones: targets are not text."""
        return np.ones(len(user_ids))

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            **{name: value for name, value in asdict(self).items() if name != "encoder"},
            "encoder": self._encoder_name,
            "topics": {split: len(topics) for split, topics in self._topics.items()},
            "projects": {split: len({topic.project for topic in topics}) for split, topics in self._topics.items()},
            "projects_of_one_project_users": {split: len(first) for split, first in self._large_projects.items()},
            "documents_per_topic": self._per_topic,
            "states_bytes": self._states.hidden.nbytes,
            "left_out": dict(self._corpus.left_out),
            "fingerprint": self._corpus.fingerprint,
            "versions": {
                **dict(self._corpus.versions),
                **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
            },
        }

    # How it is made

    def topics(self, user_ids: UserIds) -> npt.NDArray[np.int64]:
        """The topic in each folder of each user, (U, F): numbers of the topics, training topics first."""
        ids = np.asarray(user_ids, dtype=np.int64)
        alike_u = self._data.uniform("one project", ids, (1,))[:, 0].cpu().numpy() < self.one_project
        topics_uf = np.zeros((len(ids), self.folders), np.int64)
        in_split: dict[DocsSplit, npt.NDArray[np.bool_]]
        in_split = {"train": ids < self.train_users, "new": ids >= self.train_users}
        for split, is_in_u in in_split.items():
            mixed = is_in_u & ~alike_u
            first, count = self._ranges[split]
            topics_uf[mixed] = first + self._data.distinct("topics", ids[mixed], count, self.folders)
            topics_uf[is_in_u & alike_u] = self._alike(split, ids[is_in_u & alike_u])
        return topics_uf

    def _alike(self, split: DocsSplit, ids: UserIds) -> npt.NDArray[np.int64]:
        """Topics of users of one split who draw all from one project, each large project as likely: (U, F)."""
        large_p2 = self._large_projects[split]
        topics_uf = np.zeros((len(ids), self.folders), np.int64)
        project_u = self._data.integers("project", ids, max(1, len(large_p2)), 1)[:, 0]
        for project in np.unique(project_u):
            its = project_u == project
            first, count = large_p2[project]
            topics_uf[its] = first + self._data.distinct("topics", ids[its], int(count), self.folders)
        return topics_uf

    def _documents(self, user_ids: UserIds, part: Part) -> Documents:
        """All documents of a user's part, (U, N), folders in turn."""
        parts = list(self._per_folder)
        first = sum(self._per_folder[before] for before in parts[: parts.index(part)])
        last = first + self._per_folder[part]
        chosen = [
            self._data.distinct(f"documents/{f}", user_ids, self._per_topic, sum(self._per_folder.values()))
            for f in range(self.folders)
        ]
        own_unf = np.stack(chosen, axis=2)[:, first:last] + self._per_topic * self.topics(user_ids)[:, None]
        return own_unf.reshape(len(user_ids), -1)

    @property
    def _per_folder(self) -> dict[Part, int]:
        return {part: getattr(self, part) // self.folders for part in get_args(Part)}

    @cached_property
    def _data(self) -> Streams:
        return Streams(self.seed, ("docs",))

    @cached_property
    def _corpus(self) -> DocsCorpus:
        return docs_corpus()

    @cached_property
    def _states(self) -> HiddenStates:
        return hidden_states(self._corpus.documents, encoder_folder(self.encoder), self.tokens, self.layers)

    @property
    def _encoder_name(self) -> str:
        return DISTRIBUTION if self.encoder is None else Path(self.encoder).name

    @property
    def _topics(self) -> dict[DocsSplit, tuple[Topic, ...]]:
        return {"train": self._corpus.train, "new": self._corpus.new}

    @property
    def _per_topic(self) -> int:
        return min((len(topic.documents) for topics in self._topics.values() for topic in topics), default=0)

    @cached_property
    def _project_t(self) -> npt.NDArray[np.int64]:
        """The number of each topic's project."""
        projects = [topic.project for topics in self._topics.values() for topic in topics]
        return np.unique(projects, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def _ranges(self) -> dict[DocsSplit, tuple[int, int]]:
        """First topic and number of topics of each split."""
        trained = len(self._corpus.train)
        return {"train": (0, trained), "new": (trained, len(self._corpus.new))}

    @cached_property
    def _large_projects(self) -> dict[DocsSplit, npt.NDArray[np.int64]]:
        """First topic and number of topics, (P, 2), of the projects that can fill a user's folders."""
        found = {}
        for split, (start, count) in self._ranges.items():
            _, first_p, count_p = np.unique(
                self._project_t[start : start + count], return_index=True, return_counts=True
            )
            large = count_p >= self.folders
            found[split] = np.stack((start + first_p[large], count_p[large]), axis=1)
        return found


docs = DocsPopulation
