-- Invariants of webhook endpoints: sent, waiting and skipped by choice are together what was emitted.

create or replace view invariant.webhook_events_are_accounted_for as
-- The delivery log is kept for 90 days, so older events are left out.
select webhook_ranges.endpoint_id || ' ' || events.id as subject
from outbox.webhook_ranges
inner join outbox.webhook_endpoints
    on webhook_ranges.endpoint_id = webhook_endpoints.id and webhook_endpoints.deleted_at is null
inner join outbox.events
    on
        webhook_endpoints.merchant_id = events.merchant_id
        and events.generation >= (webhook_ranges.starts).generation
        and events.id >= greatest(
            webhook_ranges.from_event_id, surety.id_at('evt', surety.read_clock() - interval '89 days')
        )
where
    not webhook_ranges.is_skipped
    and outbox.is_wanted(events.type, webhook_ranges.event_types)
    and not outbox.is_before(webhook_ranges.starts, events.generation, events.xid, events.id)
    and outbox.is_before(
        coalesce(webhook_ranges.ends, outbox.position_of(webhook_endpoints)), events.generation, events.xid, events.id
    )
    and not exists (
        select from outbox.delivery_attempts
        where
            delivery_attempts.event_id = events.id and delivery_attempts.endpoint_id = webhook_endpoints.id
            and delivery_attempts.outcome in ('delivered', 'skipped')
    )
    and not exists (
        select from outbox.delivery_retries
        where delivery_retries.event_id = events.id and delivery_retries.endpoint_id = webhook_endpoints.id
    )
    and not exists (
        select from outbox.delivery_batches
        where
            events.id = any(delivery_batches.event_ids) and delivery_batches.endpoint_id = webhook_endpoints.id
    );

comment on view invariant.webhook_events_are_accounted_for is
'every event of a webhook endpoint is sent, waits or was skipped by choice';

create or replace view invariant.webhook_ranges_adjoin as
select webhook_endpoints.id as subject
from outbox.webhook_endpoints
where
    1 <> (
        select count(*) from outbox.webhook_ranges
        where
            webhook_ranges.endpoint_id = webhook_endpoints.id and not webhook_ranges.is_skipped
            and (webhook_ranges.ends is null) = (webhook_endpoints.deleted_at is null)
            and webhook_ranges.number = (
                select max(sent.number) from outbox.webhook_ranges as sent
                where sent.endpoint_id = webhook_endpoints.id and not sent.is_skipped
            )
    );

comment on view invariant.webhook_ranges_adjoin is 'every webhook endpoint has one range that it is sent';
