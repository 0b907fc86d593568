-- Handlers: what each one does, and which events it processes.

create or replace function outbox.list_handlers()
returns table (handler text, event_types text[], batch_size integer, lease_seconds double precision)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        handlers.handler,
        array(
            select handler_events.event_type
            from outbox.handler_events
            where handler_events.handler = handlers.handler
            order by handler_events.event_type
        ),
        handlers.batch_size,
        extract(epoch from handlers.lease)::double precision
    from outbox.handlers
    order by handlers.handler;
end;

comment on function outbox.list_handlers() is
'The handlers: the types of events that each one processes, the size of its batches, and how long a lease lasts.';

-- A new handler starts with the events that commit after its deploy; in an empty log it starts at the beginning.
-- Deploys keep batch_size and batches_at_once of existing handlers, because operators tune them.
insert into outbox.handlers (handler, meaning, batch_size, batches_at_once, calls_provider, generation, seen)
select
    listed.handler,
    listed.meaning,
    listed.batch_size,
    listed.batches_at_once,
    listed.calls_provider,
    outbox.current_restore_generation(),
    case when exists (select from outbox.events) then pg_current_snapshot() else '1:1:'::pg_snapshot end
from (
    values
    ('submit', 'Creates the payment at the provider.', 200, 2, true),
    ('confirm', 'Confirms the payment at the provider.', 200, 2, true),
    ('capture', 'Captures an authorized payment at the provider.', 200, 2, true),
    ('cancel', 'Cancels at the provider what must not be charged any more.', 200, 2, true),
    ('refund', 'Creates the refund at the provider.', 200, 2, true),
    ('evidence', 'Submits a dispute''s evidence to the provider.', 200, 2, true),
    ('update_customer', 'Passes a customer''s data on to the provider.', 200, 2, true),
    ('save_method', 'Saves the payment method of a payment that succeeded.', 200, 2, true),
    ('detach_method', 'Detaches a removed payment method at the provider.', 200, 2, true),
    ('seal_secret', 'Seals a client secret for the API process that asked for it.', 200, 2, false),
    ('apply_webhooks', 'Reads facts from a stored event of the provider.', 200, 2, false),
    ('expect_settlement', 'Opens the expected settlement of a confirmed payment.', 500, 2, false),
    ('meet_settlement', 'Closes the expected settlement of a payment whose money has arrived.', 500, 2, false)
) as listed (handler, meaning, batch_size, batches_at_once, calls_provider)
on conflict (handler) do update
set meaning = excluded.meaning, calls_provider = excluded.calls_provider
where (handlers.meaning, handlers.calls_provider) <> (excluded.meaning, excluded.calls_provider);

-- Each event type, and the handler that processes it.
with listed (event_type, handler) as (
    values
    ('payment.initiated', 'submit'),
    ('payment.released', 'submit'),
    ('payment.provider_submitted', 'confirm'),
    ('payment.capture_requested', 'capture'),
    ('payment.cancel_requested', 'cancel'),
    ('payment.attempt_failed', 'cancel'),
    ('payment.action_overdue', 'cancel'),
    ('payment.authorized_late', 'cancel'),
    ('payment.orphan_found', 'cancel'),
    ('payment.confirmed', 'expect_settlement'),
    ('payment.settled', 'meet_settlement'),
    ('payment.money_available', 'meet_settlement'),
    ('refund.pending', 'refund'),
    ('dispute.evidence_given', 'evidence'),
    ('customer.out_of_date', 'update_customer'),
    ('payment.method_usable', 'save_method'),
    ('customer.payment_method_detached', 'detach_method'),
    ('payment.client_secret_requested', 'seal_secret'),
    ('webhook.received', 'apply_webhooks')
),

removed as (
    delete from outbox.handler_events
    where (handler_events.event_type, handler_events.handler) not in (
        select
            listed.event_type,
            listed.handler
        from listed
    )
    and handler_events.handler in (select listed.handler from listed)
)

insert into outbox.handler_events (handler, event_type)
select
    listed.handler,
    listed.event_type
from listed
on conflict do nothing;
