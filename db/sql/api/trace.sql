-- A payment's trace.

create or replace function api.get_trace(p_key_hash bytea, p_id text) returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select json_build_object(
                'payment', shown.document,
                'entries', (
                    select coalesce(json_agg(json_build_object(
                        'at', surety.format_time(entry.at),
                        'kind', entry.kind,
                        'actor', json_build_object(
                            'type', split_part(entry.actor, ':', 1), 'id', nullif(split_part(entry.actor, ':', 2), '')
                        ),
                        -- The rest of an error's text is not for merchants.
                        'summary',
                        case entry.kind when 'retry' then split_part(entry.summary, ':', 1) else entry.summary end,
                        'from', entry.from_state,
                        'to', entry.to_state,
                        'outcome', entry.outcome,
                        'duration_ms', entry.duration_ms,
                        'data', entry.data
                    ) order by entry.place), '[]'::json)
                    from surety.trace_payment(p_id) with ordinality as entry (
                        at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data, place
                    )
                )
            )::text
            from surety.payments cross join lateral api.show_payment(payments) as shown
            where payments.id = p_id and payments.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash) as who;
end;

comment on function api.get_trace(bytea, text) is
'The history of a payment, oldest first; body is null if the merchant has none of that id. No row: unknown key.';
