-- Invariants of the outbox: no event is lost or handled twice, no payment waits for nothing.

create or replace view invariant.leases_are_not_overdue as
select batches.id::text as subject
from outbox.batches
where batches.leased_until < surety.read_clock() - interval '10 minutes';

comment on view invariant.leases_are_not_overdue is 'every lease is renewed or taken over';

create or replace view invariant.events_are_in_one_place as
select held.event_id as subject
from (
    select
        batches.handler,
        taken.event_id
    from outbox.batches
    cross join lateral unnest(batches.event_ids) as taken (event_id)
    union all
    select
        retries.handler,
        retries.event_id
    from outbox.retries
    where retries.due_at is not null
) as held
group by held.handler, held.event_id
having count(*) > 1;

comment on view invariant.events_are_in_one_place is 'every event is in at most one place per handler';

create or replace view invariant.payments_are_not_forgotten as
-- Events that are still to be handled: not seen yet, leased or to be retried. Never a scan of all events.
with pending as materialized (
    select events.aggregate_id
    from outbox.handlers
    inner join outbox.events
        on
            handlers.generation = events.generation and events.xid >= pg_catalog.pg_snapshot_xmin(handlers.seen)
    inner join outbox.handler_events
        on handlers.handler = handler_events.handler and events.type = handler_events.event_type
    where not pg_catalog.pg_visible_in_snapshot(events.xid, handlers.seen)
    union
    select events.aggregate_id
    from outbox.batches
    cross join lateral unnest(batches.event_ids) as taken (event_id)
    inner join outbox.events on taken.event_id = events.id
    union
    select events.aggregate_id
    from outbox.retries
    inner join outbox.events on retries.event_id = events.id
    where retries.due_at is not null
)

select payments.id as subject
from surety.payments
inner join surety.states on payments.state = states.state
where
    -- It is not polled, expects no settlement, and has no open dispute, pending event, open dead letter or hold.
    not states.is_final and payments.poll_at is null
    and not exists (
        select from surety.expectations
        where expectations.payment_id = payments.id and expectations.met_at is null
    )
    and not exists (
        select from surety.disputes
        where disputes.payment_id = payments.id and disputes.poll_at is not null
    )
    and not exists (select from pending where pending.aggregate_id = payments.id)
    and not exists (
        select from outbox.dead_letters
        where dead_letters.payment_id = payments.id and dead_letters.closed_at is null
    )
    and not exists (
        select from surety.payment_holds
        where payment_holds.payment_id = payments.id and payment_holds.closed_at is null
    );

comment on view invariant.payments_are_not_forgotten is 'no payment is forgotten';
