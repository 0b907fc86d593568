-- Handlers: which events each one handles.

create or replace function outbox.list_handlers()
returns table (handler text, event_types text[], batch_size integer, lease_seconds double precision)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        handlers.handler,
        handlers.event_types,
        handlers.batch_size,
        extract(epoch from handlers.lease)::double precision
    from outbox.handlers
    order by handlers.handler;
end;

comment on function outbox.list_handlers() is
'Which handler wants which events, how many at once, and how long it may hold them before it must renew its lease.';

-- A handler that is added later starts with what commits from then on; name '1:1:' to start at the beginning. Which
-- events it handles is its code's business; how many at once, the operator's.
insert into outbox.handlers (handler, event_types, batch_size, batches_at_once, calls_provider, generation, seen)
select
    h.handler,
    h.event_types,
    h.batch_size,
    h.batches_at_once,
    h.calls_provider,
    outbox.current_restore_generation(),
    case when exists (select from outbox.events) then pg_current_snapshot() else '1:1:'::pg_snapshot end
from (
    values
    ('submit', array['payment.initiated'], 200, 2, true),
    ('confirm', array['payment.provider_submitted'], 200, 2, true),
    ('settle', array['payment.confirmed'], 500, 2, false),
    ('close', array['payment.settled'], 500, 2, false),
    ('apply', array['webhook.received'], 200, 2, false),
    (
        'cancel',
        array[
            'payment.attempt_failed', 'payment.action_overdue', 'payment.cancel_requested', 'payment.authorized_late',
            'payment.orphan_found'
        ],
        200, 2, true
    ),
    ('capture', array['payment.capture_requested'], 200, 2, true),
    ('refund', array['refund.pending'], 200, 2, true),
    ('evidence', array['dispute.evidence_given'], 200, 2, true)
) as h (handler, event_types, batch_size, batches_at_once, calls_provider)
on conflict (handler) do update
set event_types = excluded.event_types, calls_provider = excluded.calls_provider
where (handlers.event_types, handlers.calls_provider) <> (excluded.event_types, excluded.calls_provider);
