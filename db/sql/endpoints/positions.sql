-- Positions in a merchant's log of events, and what an endpoint wants of it.

create or replace function outbox.is_wanted(p_type text, p_event_types text[]) returns boolean
language sql immutable parallel safe
begin atomic
    select '*' = any(p_event_types) or p_type = any(p_event_types)
        or split_part(p_type, '.', 1) || '.*' = any(p_event_types);
end;

comment on function outbox.is_wanted(text, text[]) is
'Whether an event of a type passes a filter: types, families such as refund.*, or * for all.';

create or replace function outbox.is_before(
    p_position outbox.log_position, p_generation integer, p_xid xid8, p_id text
) returns boolean
language sql stable
begin atomic
    select p_generation < (p_position).generation or (
        p_generation = (p_position).generation and (
            pg_visible_in_snapshot(p_xid, (p_position).seen) or (
                (p_position).goal is not null and pg_visible_in_snapshot(p_xid, (p_position).goal)
                and (p_xid, p_id) <= ((p_position).at_xid, (p_position).at_id)
            )
        )
    );
end;

comment on function outbox.is_before(outbox.log_position, integer, xid8, text) is
'Whether a cursor at this position has passed the event with these columns.';

create or replace function outbox.position_of(p outbox.webhook_endpoints) returns outbox.log_position
language sql immutable
begin atomic
    select (p.generation, p.seen, p.goal, p.at_xid, p.at_id)::outbox.log_position;
end;

comment on function outbox.position_of(outbox.webhook_endpoints) is 'The position of an endpoint''s cursor.';

create or replace function outbox.position_now() returns outbox.log_position
language sql stable
begin atomic
    select (outbox.current_restore_generation(), pg_current_snapshot(), null, '0', '')::outbox.log_position;
end;

comment on function outbox.position_now() is
'The position after all events that are committed. A transaction that is open now has its events after it.';

create or replace function outbox.audit_endpoint(
    p_endpoint outbox.webhook_endpoints, p_actor text, p_outcome text, p_snapshot jsonb
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    -- The address may hold a token of the merchant's, so only its host is audited.
    select audit.write_entry(
        case when p_actor like 'operator:%' then 'operator' else 'system' end, p_actor, p_outcome,
        p_merchant_id => p_endpoint.merchant_id,
        p_snapshot => jsonb_build_object(
            'webhook_endpoint', p_endpoint.id, 'host', substring(p_endpoint.url from '^https?://([^/?#]*)')
        ) || p_snapshot
    );
end;

comment on function outbox.audit_endpoint(outbox.webhook_endpoints, text, text, jsonb) is
'Audits what happened to an endpoint: by an operator, a key or a worker.';
