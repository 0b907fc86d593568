-- A payment's trace, as its merchant may read it. Operators read surety.trace_payment, which shows everything.

create or replace function api.summarize_trace_entry(p_kind text, p_summary text, p_outcome text, p_data jsonb)
returns text
language sql stable parallel safe
begin atomic
    -- An error's text and an operator's reason are written for operators, so merchants never see them.
    select case
        when p_kind in ('request', 'step', 'refund', 'dispute', 'webhook', 'poll', 'file', 'transfer') then p_summary
        when p_kind = 'call' and p_summary like '←%'
            then '← ' || split_part(p_data ->> 'operation', ':', 1) || ' ' || p_outcome
        when p_kind = 'call' then '→ ' || split_part(p_data ->> 'operation', ':', 1)
        when p_kind = 'retry' then split_part(p_summary, ':', 1)
        else concat_ws(' ', p_kind, p_outcome)
    end;
end;

comment on function api.summarize_trace_entry(text, text, text, jsonb) is
'The summary of an entry of a trace for its merchant: without errors'' texts and operators'' reasons.';

create or replace function api.select_trace_data(p_kind text, p_actor text, p_data jsonb) returns jsonb
language sql stable parallel safe
begin atomic
    select case
        when p_kind not in ('call', 'retry', 'operator') and p_actor like 'key:%' then p_data
        when p_kind in ('step', 'refund', 'dispute', 'webhook', 'poll', 'file', 'transfer')
            then p_data - 'address' - 'request_id'
        when p_kind in ('call', 'retry')
            then jsonb_strip_nulls(jsonb_build_object(
                'operation', p_data -> 'operation', 'key', p_data -> 'key', 'status', p_data -> 'status',
                'sends', p_data -> 'sends', 'failures', p_data -> 'failures'
            ))
        else '{}'
    end;
end;

comment on function api.select_trace_data(text, text, jsonb) is
'The data of an entry of a trace for its merchant: of calls and retries only the named fields, of operators'' entries
none, and no address or request but the merchant''s own.';

create or replace function api.get_trace(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
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
                            'type', split_part(entry.actor, ':', 1),
                            -- Names of workers and operators are not for merchants.
                            'id', case when entry.actor like 'key:%' then split_part(entry.actor, ':', 2) end
                        ),
                        'summary',
                        api.summarize_trace_entry(entry.kind, entry.summary, entry.outcome, entry.data),
                        'from', entry.from_state,
                        'to', entry.to_state,
                        'outcome', entry.outcome,
                        'duration_ms', entry.duration_ms,
                        'data', api.select_trace_data(entry.kind, entry.actor, entry.data)
                    ) order by entry.place), '[]'::json)
                    from surety.trace_payment(p_id) with ordinality as entry (
                        at, kind, actor, summary, from_state, to_state, outcome, duration_ms, data, place
                    )
                )
            )::text
            from surety.payments cross join lateral api.show_payment(payments) as shown
            where payments.id = p_id and payments.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_trace(bytea, text, text) is
'The history of a payment as its merchant may read it, oldest first; body is null if the merchant has none of that id.
No row: the key may not read.';
