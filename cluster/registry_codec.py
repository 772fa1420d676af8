"""Registry records to and from the wire."""

from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import WorkerRecord
from wire import common_pb2, registry_pb2

_ROLE_TO_WIRE: dict[Role, common_pb2.Role] = {
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
}
_ROLE_FROM_WIRE = {wire: role for role, wire in _ROLE_TO_WIRE.items()}


class UnknownRole(ValueError):
    """A role of a newer peer; such a worker is of no use to this version."""


def role_from_wire(role: common_pb2.Role) -> Role:
    """Raises UnknownRole for what this version does not know."""
    known = _ROLE_FROM_WIRE.get(role)
    if known is None:
        raise UnknownRole(f"role {role} is not known to this version")
    return known


def record_to_wire(record: WorkerRecord) -> registry_pb2.WorkerRecord:
    return registry_pb2.WorkerRecord(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        role=_ROLE_TO_WIRE[record.role],
        epoch=record.epoch,
        address=record.address,
        router_address=record.router_address,
        model_id=record.model_id,
        pid=record.pid,
        network_domain=record.network_domain,
    )


def record_from_wire(record: registry_pb2.WorkerRecord) -> WorkerRecord:
    """Raises UnknownRole."""
    return WorkerRecord(
        worker_id=WorkerId(record.worker_id),
        incarnation=Incarnation(record.incarnation),
        role=role_from_wire(record.role),
        epoch=record.epoch,
        address=record.address,
        router_address=record.router_address,
        model_id=ModelId(record.model_id),
        pid=record.pid,
        network_domain=record.network_domain,
    )


def records_to_wire(records: tuple[WorkerRecord, ...]) -> registry_pb2.WorkerRecords:
    return registry_pb2.WorkerRecords(records=[record_to_wire(record) for record in records])


def records_from_wire(records: registry_pb2.WorkerRecords) -> tuple[WorkerRecord, ...]:
    """Skips workers of a role this version does not know."""
    known: list[WorkerRecord] = []
    for record in records.records:
        try:
            known.append(record_from_wire(record))
        except UnknownRole:
            continue
    return tuple(known)
