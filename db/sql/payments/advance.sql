-- advance: the steps that lead from a payment's state to the derived one.

create or replace function surety.advance_payments(p_derived surety.derived[], p_cause text, p_actor text, p_request_id
text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Brings amounts and state of payments, already locked, to what their facts say: by way of the mandatory steps not yet
-- made, then by one direct step. Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_types text [];
begin
    with targets as materialized (
        select
            d.*, p.id, p.version, p.state, p.rail, p.capture_method,
            d.captured_minor > 0 as is_captured,
            p.state in ('failed', 'canceled') as has_ended,
            d.refunded_minor <> p.refunded_minor as is_refunded_otherwise,
            array(select s.to_state from surety.steps as s where s.payment_id = p.id) as visited,
            array[p.captured_minor, p.refunded_minor, p.refund_pending_minor, p.at_risk_minor, p.reversed_minor]
            = array[d.captured_minor, d.refunded_minor, d.refund_pending_minor, d.at_risk_minor, d.reversed_minor]
            and p.provider_id is not distinct from d.provider_id
            and (p.next_action is not distinct from d.next_action or d.target_state <> 'requires_action')
            and p.failure is not distinct from d.failure as is_same,
            p.provider_id is distinct from d.provider_id as is_another
        from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
    ),
    path as materialized (
        select
            t.id, t.version, t.state as from_first, t.evidenced, t.is_settled, t.target_state,
            way.position, way.state, row_number() over w as n, lag(way.state, 1, t.state) over w as from_state,
            t.is_same, t.captured_minor, t.refunded_minor, t.refund_pending_minor, t.at_risk_minor, t.reversed_minor,
            t.provider_id, t.next_action, t.failure
        from targets as t
        left join lateral (
            -- What the mandatory path demands up to the target and was never visited …
            select m.position, m.state
            from surety.mandatory_steps as m
            where m.rail = t.rail and m.capture_method = t.capture_method and m.state <> all(t.visited)
                and case
                    -- What ended once and succeeded after all goes on from confirmed, whatever it had left out before.
                    when t.is_captured and t.visited && array['failed', 'canceled']
                        then m.position = 5 or (m.position = 6 and t.is_settled)
                    when t.is_captured then m.position <= 5 or t.is_settled
                    else not t.has_ended and (
                        m.position <= 3 or m.state = t.target_state
                        -- … or, on the way to its end, is known to have been …
                        or m.position = 4 and m.state = any(t.evidenced) and t.target_state <> t.state
                    )
                end
            union all
            -- … a lost dispute was a dispute …
            select 90, 'disputed'
            where t.target_state = 'reversed' and t.is_lost and t.state not in ('disputed', 'reversed')
            union all
            -- … and the target itself, unless it is where we stand or one of the above.
            select 99, t.target_state
            where (t.is_captured or not t.has_ended)
                and (
                    t.target_state <> t.state
                    or t.target_state = 'partially_refunded' and t.is_refunded_otherwise
                    or t.is_settled and t.target_state <> 'settled' and 'settled' <> all(t.visited)
                )
                and not exists (
                    select from surety.mandatory_steps as m
                    where m.rail = t.rail and m.capture_method = t.capture_method and m.state = t.target_state
                        and m.state <> all(t.visited)
                )
        ) as way on true
        window w as (partition by t.id order by way.position)
    ),
    walked as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, implied, at, actor, request_id)
        select
            path.id, path.version + path.n::integer, path.from_state, path.state, p_cause,
            path.state <> path.target_state and path.state <> all(coalesce(path.evidenced, '{}'))
            and not (path.state = 'settled' and path.is_settled),
            v_now, p_actor, p_request_id
        from path where path.state is not null
        order by path.id, path.position
        returning to_state
    ),
    -- State and amounts in one update: the steps' trigger finds the projection already made.
    changed as (
        update surety.payments as p
        set version = t.version + case when t.state is null then 0 else t.n::integer end,
            state = coalesce(t.state, p.state),
            captured_minor = t.captured_minor, refunded_minor = t.refunded_minor,
            refund_pending_minor = t.refund_pending_minor, at_risk_minor = t.at_risk_minor,
            reversed_minor = t.reversed_minor, provider_id = coalesce(t.provider_id, p.provider_id),
            next_action = case when coalesce(t.state, p.state) = 'requires_action' then t.next_action end,
            -- Why the provider refused it is no fact, and stays true of what has failed.
            failure = case
                when p.state = 'failed' and t.captured_minor = 0 then coalesce(t.failure, p.failure) else t.failure
            end,
            updated_at = v_now,
            poll_at = case when t.state is null then p.poll_at else v_now + s.poll_after end,
            poll_count = case when t.state is null then p.poll_count else 0 end
        from (select distinct on (path.id) path.* from path order by path.id, path.position desc) as t
        left join surety.states as s on s.state = t.state
        where p.id = t.id and (not t.is_same or t.state is not null)
    ),
    orphans as (
        -- We ended it, and the provider holds something live or ended it otherwise: never a step, always somebody's
        -- business.
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', v_now), 'state', t.id, t.id,
            format('%s here, %s at the provider', t.state, t.target_state), v_now
        from targets as t
        where t.has_ended and not t.is_captured and t.target_state not in (t.state, 'provider_submitted')
        on conflict (kind, subject) do nothing
        returning payment_id, detail
    ),
    called_off as (
        select outbox.emit_event(
            'payment', t.id, 'payment.authorized_late', jsonb_build_object('payment_id', t.id, 'reason', 'ended'),
            null, t.version) as event_id
        from targets as t
        where t.has_ended and not t.is_captured
            and t.target_state in ('provider_submitted', 'requires_action', 'authorized', 'processing')
            and (t.is_another or t.id in (select o.payment_id from orphans as o))
    ),
    excesses as (
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
        select
            surety.new_id('dis', v_now), 'amount', d.payment_id, d.payment_id,
            case
                when d.excess_minor > 0 then format('%s more was captured than was asked for', d.excess_minor)
                when d.over_refunded_minor > 0
                    then format('%s more was refunded than was captured', d.over_refunded_minor)
                else format(
                    '%s was refunded and %s disputed or returned, of %s',
                    d.refunded_minor, d.at_risk_minor + d.reversed_minor, d.captured_minor)
            end,
            '{}', true, v_now
        from unnest(p_derived) as d
        where d.excess_minor > 0 or d.over_refunded_minor > 0
            or d.refunded_minor + d.at_risk_minor + d.reversed_minor > d.captured_minor
        on conflict (kind, subject) do nothing
    )
    select array_agg(distinct made.type) into v_types
    from (
        select 'payment.' || w.to_state as type from walked as w
        union all
        select 'payment.authorized_late' from called_off
    ) as made;
    return coalesce(v_types, '{}');
end;
$$;
