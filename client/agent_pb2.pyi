from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import containers as _containers

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("data", "total_bytes")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    data: bytes
    def __init__(self, total_bytes: int | None = ..., data: bytes | None = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: str | None = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: str | None = ...) -> None: ...

class Instructions(_message.Message):
    __slots__ = ("attempt", "durable_round", "federation", "positions", "round_index", "split", "task", "version")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_ROUND_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    federation: str
    round_index: int
    attempt: int
    version: str
    split: str
    positions: _containers.RepeatedScalarFieldContainer[int]
    durable_round: int
    task: str
    def __init__(
        self,
        federation: str | None = ...,
        round_index: int | None = ...,
        attempt: int | None = ...,
        version: str | None = ...,
        split: str | None = ...,
        positions: _Iterable[int] | None = ...,
        durable_round: int | None = ...,
        task: str | None = ...,
    ) -> None: ...

class Work(_message.Message):
    __slots__ = ("attempt", "federation", "round_index", "version")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    federation: str
    round_index: int
    attempt: int
    version: str
    def __init__(
        self,
        federation: str | None = ...,
        round_index: int | None = ...,
        attempt: int | None = ...,
        version: str | None = ...,
    ) -> None: ...

class ContributionPart(_message.Message):
    __slots__ = ("chunk", "head")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ContributionHead
    chunk: Chunk
    def __init__(
        self, head: ContributionHead | _Mapping | None = ..., chunk: Chunk | _Mapping | None = ...
    ) -> None: ...

class ContributionHead(_message.Message):
    __slots__ = ("users", "work")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: str | None = ..., value: int | None = ...) -> None: ...

    WORK_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    work: Work
    users: _containers.ScalarMap[str, int]
    def __init__(
        self, work: Work | _Mapping | None = ..., users: _Mapping[str, int] | None = ...
    ) -> None: ...

class Measures(_message.Message):
    __slots__ = ("measured", "sums", "users", "work")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: str | None = ..., value: int | None = ...) -> None: ...

    class SumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: str | None = ..., value: float | None = ...) -> None: ...

    WORK_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    work: Work
    users: _containers.ScalarMap[str, int]
    measured: int
    sums: _containers.ScalarMap[str, float]
    def __init__(
        self,
        work: Work | _Mapping | None = ...,
        users: _Mapping[str, int] | None = ...,
        measured: int | None = ...,
        sums: _Mapping[str, float] | None = ...,
    ) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("order", "release", "software", "users", "versions")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: str | None = ..., value: int | None = ...) -> None: ...

    USERS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    users: _containers.ScalarMap[str, int]
    order: int
    versions: _containers.RepeatedScalarFieldContainer[str]
    release: str
    software: str
    def __init__(
        self,
        users: _Mapping[str, int] | None = ...,
        order: int | None = ...,
        versions: _Iterable[str] | None = ...,
        release: str | None = ...,
        software: str | None = ...,
    ) -> None: ...

class User(_message.Message):
    __slots__ = ("user",)
    USER_FIELD_NUMBER: _ClassVar[int]
    user: str
    def __init__(self, user: str | None = ...) -> None: ...

class Personalised(_message.Message):
    __slots__ = ("loss_after", "loss_before", "personal_bytes", "steps", "version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    version: str
    steps: int
    personal_bytes: int
    loss_before: float
    loss_after: float
    def __init__(
        self,
        version: str | None = ...,
        steps: int | None = ...,
        personal_bytes: int | None = ...,
        loss_before: float | None = ...,
        loss_after: float | None = ...,
    ) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("max_tokens", "seed", "temperature", "text", "user")
    USER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    user: str
    text: str
    max_tokens: int
    temperature: float
    seed: int
    def __init__(
        self,
        user: str | None = ...,
        text: str | None = ...,
        max_tokens: int | None = ...,
        temperature: float | None = ...,
        seed: int | None = ...,
    ) -> None: ...

class Text(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: str | None = ...) -> None: ...

class Writing(_message.Message):
    __slots__ = ("text", "user")
    USER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    user: str
    text: str
    def __init__(self, user: str | None = ..., text: str | None = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("bits_per_char", "nats_per_token", "tokens")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NATS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_CHAR_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    nats_per_token: float
    bits_per_char: float
    def __init__(
        self,
        tokens: int | None = ...,
        nats_per_token: float | None = ...,
        bits_per_char: float | None = ...,
    ) -> None: ...

class Forgotten(_message.Message):
    __slots__ = ("cannot_undo", "federations", "had_values")
    HAD_VALUES_FIELD_NUMBER: _ClassVar[int]
    FEDERATIONS_FIELD_NUMBER: _ClassVar[int]
    CANNOT_UNDO_FIELD_NUMBER: _ClassVar[int]
    had_values: bool
    federations: int
    cannot_undo: _containers.RepeatedScalarFieldContainer[str]
    def __init__(
        self,
        had_values: bool | None = ...,
        federations: int | None = ...,
        cannot_undo: _Iterable[str] | None = ...,
    ) -> None: ...

class RebaseRequest(_message.Message):
    __slots__ = ("margin", "user", "version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    version: str
    user: str
    margin: float
    def __init__(
        self, version: str | None = ..., user: str | None = ..., margin: float | None = ...
    ) -> None: ...

class Rebased(_message.Message):
    __slots__ = ("moved", "stayed")
    MOVED_FIELD_NUMBER: _ClassVar[int]
    STAYED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    stayed: int
    def __init__(self, moved: int | None = ..., stayed: int | None = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServingStatus(_message.Message):
    __slots__ = ("disk_bytes", "forgotten", "personalised", "release", "users", "versions")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: str | None = ..., value: int | None = ...) -> None: ...

    USERS_FIELD_NUMBER: _ClassVar[int]
    PERSONALISED_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    users: _containers.ScalarMap[str, int]
    personalised: int
    forgotten: int
    release: str
    versions: _containers.RepeatedScalarFieldContainer[str]
    disk_bytes: int
    def __init__(
        self,
        users: _Mapping[str, int] | None = ...,
        personalised: int | None = ...,
        forgotten: int | None = ...,
        release: str | None = ...,
        versions: _Iterable[str] | None = ...,
        disk_bytes: int | None = ...,
    ) -> None: ...
