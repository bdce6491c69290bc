from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("total_bytes", "data")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    data: bytes
    def __init__(self, total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class Instructions(_message.Message):
    __slots__ = ("federation", "round_index", "attempt", "version", "split", "positions", "durable_round", "task")
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
    def __init__(self, federation: _Optional[str] = ..., round_index: _Optional[int] = ..., attempt: _Optional[int] = ..., version: _Optional[str] = ..., split: _Optional[str] = ..., positions: _Optional[_Iterable[int]] = ..., durable_round: _Optional[int] = ..., task: _Optional[str] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("federation", "round_index", "attempt", "version")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    federation: str
    round_index: int
    attempt: int
    version: str
    def __init__(self, federation: _Optional[str] = ..., round_index: _Optional[int] = ..., attempt: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class ContributionPart(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ContributionHead
    chunk: Chunk
    def __init__(self, head: _Optional[_Union[ContributionHead, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class ContributionHead(_message.Message):
    __slots__ = ("work", "users")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORK_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    work: Work
    users: _containers.ScalarMap[str, int]
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., users: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Measures(_message.Message):
    __slots__ = ("work", "users", "measured", "sums")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class SumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORK_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    work: Work
    users: _containers.ScalarMap[str, int]
    measured: int
    sums: _containers.ScalarMap[str, float]
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., users: _Optional[_Mapping[str, int]] = ..., measured: _Optional[int] = ..., sums: _Optional[_Mapping[str, float]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("users", "order", "versions", "release", "software")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
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
    def __init__(self, users: _Optional[_Mapping[str, int]] = ..., order: _Optional[int] = ..., versions: _Optional[_Iterable[str]] = ..., release: _Optional[str] = ..., software: _Optional[str] = ...) -> None: ...

class User(_message.Message):
    __slots__ = ("user",)
    USER_FIELD_NUMBER: _ClassVar[int]
    user: str
    def __init__(self, user: _Optional[str] = ...) -> None: ...

class Personalised(_message.Message):
    __slots__ = ("version", "steps", "personal_bytes", "loss_before", "loss_after")
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
    def __init__(self, version: _Optional[str] = ..., steps: _Optional[int] = ..., personal_bytes: _Optional[int] = ..., loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("user", "text", "max_tokens", "temperature", "seed")
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
    def __init__(self, user: _Optional[str] = ..., text: _Optional[str] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Text(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Writing(_message.Message):
    __slots__ = ("user", "text")
    USER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    user: str
    text: str
    def __init__(self, user: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("tokens", "nats_per_token", "bits_per_char")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NATS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_CHAR_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    nats_per_token: float
    bits_per_char: float
    def __init__(self, tokens: _Optional[int] = ..., nats_per_token: _Optional[float] = ..., bits_per_char: _Optional[float] = ...) -> None: ...

class BegunAnew(_message.Message):
    __slots__ = ("had_course",)
    HAD_COURSE_FIELD_NUMBER: _ClassVar[int]
    had_course: bool
    def __init__(self, had_course: _Optional[bool] = ...) -> None: ...

class Forgotten(_message.Message):
    __slots__ = ("had_values", "federations", "cannot_undo")
    HAD_VALUES_FIELD_NUMBER: _ClassVar[int]
    FEDERATIONS_FIELD_NUMBER: _ClassVar[int]
    CANNOT_UNDO_FIELD_NUMBER: _ClassVar[int]
    had_values: bool
    federations: int
    cannot_undo: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, had_values: _Optional[bool] = ..., federations: _Optional[int] = ..., cannot_undo: _Optional[_Iterable[str]] = ...) -> None: ...

class RebaseRequest(_message.Message):
    __slots__ = ("version", "user", "margin")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    version: str
    user: str
    margin: float
    def __init__(self, version: _Optional[str] = ..., user: _Optional[str] = ..., margin: _Optional[float] = ...) -> None: ...

class Rebased(_message.Message):
    __slots__ = ("moved", "stayed")
    MOVED_FIELD_NUMBER: _ClassVar[int]
    STAYED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    stayed: int
    def __init__(self, moved: _Optional[int] = ..., stayed: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServingStatus(_message.Message):
    __slots__ = ("users", "personalised", "forgotten", "release", "versions", "disk_bytes")
    class UsersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
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
    def __init__(self, users: _Optional[_Mapping[str, int]] = ..., personalised: _Optional[int] = ..., forgotten: _Optional[int] = ..., release: _Optional[str] = ..., versions: _Optional[_Iterable[str]] = ..., disk_bytes: _Optional[int] = ...) -> None: ...
