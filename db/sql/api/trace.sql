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
                        'at', surety.format_time(told.at),
                        'kind', told.kind,
                        'actor', json_build_object(
                            'type', split_part(told.actor, ':', 1), 'id', nullif(split_part(told.actor, ':', 2), '')
                        ),
                        -- What an error says about us is not the merchants'.
                        'summary',
                        case told.kind when 'retry' then split_part(told.summary, ':', 1) else told.summary end,
                        'from', told.from_state,
                        'to', told.to_state,
                        'outcome', told.outcome,
                        'duration_ms', told.duration_ms,
                        'data', told.data
                    ) order by told.place), '[]'::json)
                    from surety.trace_payment(p_id) with ordinality as told (
                        at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data, place
                    )
                )
            )::text
            from surety.payments cross join lateral api.show_payment(payments) as shown
            where payments.id = p_id and payments.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash) as who;
end;
